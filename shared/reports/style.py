"""The look of every page: one column on a phone, two on a desk, on a light or a dark background, and on paper."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --dim: #56616d; --paper: #ffffff; --line: #d9dee4;
        --soft: #f4f6f8; --accent: #2b5f96; --right: #17713f; --wrong: #b3261e; --bar: #cfe0f2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --dim: #a7b1bb; --paper: #14181d; --line: #333b44; --soft: #1d232a; --accent: #8db8e2;
          --right: #6fd09a; --wrong: #ff9a90; --bar: #274663 }
}
* { box-sizing: border-box }
html { scroll-padding-top: 1rem }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
       overflow-wrap: anywhere }
header, main { margin: 0 auto; padding: 0 1rem; max-width: 72rem }
header { padding-top: 1.6rem } main { padding-bottom: 4rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem }
h2 { font-size: 1.25rem; margin: 0 0 .8rem; color: var(--accent) }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem }
section { margin-top: 2.4rem; padding-top: 1.2rem; border-top: 1px solid var(--line) }
p { margin: .4rem 0; max-width: 46rem } .dim, figcaption { color: var(--dim); font-size: .9rem }
a { color: var(--accent) } :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
.skip { position: absolute; left: -999rem } .skip:focus { left: 1rem; top: .3rem; background: var(--paper) }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; margin: .8rem 0 0; padding: 0 }
nav a { display: inline-block; padding: .25rem 0 }
.grid { display: grid; gap: 0 2.4rem; align-items: start;
        grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)) }
.figures { display: grid; gap: 1.6rem 2rem; align-items: start;
           grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)) }
figure { margin: 0; max-width: 34rem } figure h3 { margin: 0 0 .2rem } figure img { width: 100%; height: auto }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; list-style: none; margin: 0 0 1.2rem; padding: 0 }
.key svg { width: 2.2rem; height: .9rem; margin-right: .45rem; vertical-align: -1px }
.cards { display: grid; gap: 1rem; margin-top: .8rem;
         grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)) }
.card { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: .8rem }
.card img { display: block; width: 100%; height: 11rem; object-fit: contain; background: #000; border-radius: 4px;
            margin-bottom: .6rem }
dl { margin: 0 } dt { font-size: .8rem; color: var(--dim) } dd { margin: 0 0 .45rem; white-space: pre-line }
.right, .wrong { font-weight: 600 } .right { color: var(--right) } .wrong { color: var(--wrong) }
.wide { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-size: .92rem; margin: .3rem 0 .8rem }
caption { text-align: left; color: var(--dim); font-size: .9rem; padding-bottom: .3rem }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
.wide th, .wide td { overflow-wrap: normal; white-space: nowrap } thead th { color: var(--dim); font-weight: 600 }
.wide tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; max-width: 14rem }
caption span { display: inline-block; position: sticky; left: 0; max-width: calc(100vw - 2rem); white-space: normal }
tbody th { font-weight: 600 }
.facts th { font-weight: 400; color: var(--dim); min-width: 8rem } .facts { width: 100% }
.token { white-space: pre; font-family: ui-monospace, monospace; background: var(--soft);
         border-radius: 3px; padding: 0 .2rem }
.share { display: block; min-width: 6.5rem; padding: 0 .3rem;
         background: linear-gradient(to right, var(--bar) var(--part), transparent var(--part)) }
.beside { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0 1.6rem; align-items: start;
          margin: 1rem 0 1.6rem }
@media (min-width: 46rem) { .beside { grid-template-columns: 17rem minmax(0, 1fr) } }
details { margin: .5rem 0 } summary { cursor: pointer; padding: .25rem 0 }
pre { overflow-x: auto; background: var(--soft); padding: .8rem; border-radius: 6px; font-size: .85rem;
      max-height: 32rem }
@media print { nav, .skip { display: none } section, figure, .card { break-inside: avoid } }
"""
