"""Writes the reference of all keys to the standard output: ``python -m shared.recipes > docs/recipes.md``."""

from shared.recipes.reference import reference

if __name__ == "__main__":
    print(reference(), end="")
