"""Rows become conversations: one small reader for each form that people write.

    form      what a row has
    question_answer   a question, an answer, pictures
    messages          [{"role", "content"}, ...] as OpenAI, TRL and Transformers write them
    conversations     [{"from", "value"}, ...] as LLaVA and ShareGPT write them

    read = READERS["messages"](row["messages"], listed_pictures(row["images"]), where="train, row 17")
    read.turns, read.pictures

A conversation ends with an assistant's turn.  Pictures stand in the order in which the turns show them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from shared.data.pictures import is_nothing, looks_like_pictures, of_base64
from shared.data.texts import is_visible, require_unicode, required_text, written_out
from shared.errors import DataError, shortened

Form = Literal["question_answer", "messages", "conversations"]
FORMS: tuple[Form, ...] = get_args(Form)
Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
PAIR = {"user", "assistant"}  # keys of a turn that is a question and its answer
PLACEHOLDER = "<image>"
MAX_TURNS = 10_000
# Places of regions and names, and of pictures, as other tools write them: as texts, they would be learned literally.
_OF_REGIONS = re.compile(r"<bbox>|<ref-object>")
_OF_PICTURES = re.compile(
    r"<img>[^<>\n]+</img>|<image[ _-]?\d+>|<\|image_\d+\|>|<\|vision_start\|><\|image_pad\|><\|vision_end\|>"
    r"|<\|(?:image|video|audio)(?:_pad)?\|>|<start_of_image>|<IMG_CONTEXT>|<ImageHere>|<image_placeholder>"
    r"|\[IMG\](?!.*\[/IMG\])"  # pairs of them are an address in a forum's posts
    r"|\A\s*<(?P<media>video|audio)>(?!.*</(?P=media)>)",  # elsewhere, and in pairs, they are HTML
    re.DOTALL,
)
_NEAR_PLACE = re.compile(r"<\s*image\s*>", re.IGNORECASE)
# Keys of a turn that say something which a prompt of texts and pictures would lose.
_UNUSED_KEYS = (
    "tool_calls",
    "function_call",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
    "mask",  # which leaves a turn out in some formats where it is true, and in others where it is false
    *("image", "images", "audio", "audios", "video", "videos"),
)
_OF_ROWS = ("answer_ids", "answer_end")  # which are the last answer's, and stand beside the turns
_PICTURE_KEYS = ("image_url", "image", "url", "path", "bytes", "base64")  # of a part
_SOURCE_KEYS = ("source", "data", "file")  # by which other formats hold a part's picture
# By which formats leave single answers out, or weigh them; what of these says that an answer is learned as it is.
_LEARNED = ("weight", "loss", "loss_weight", "loss_scale", "train", "trainable", "label")
_LEFT_OUT = ("ignore",)
_YES, _NO = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0")


@dataclass(frozen=True)
class Turn:
    """What one side says: texts, and None in the place of each picture."""

    role: Role
    parts: tuple[str | None, ...]

    @property
    def text(self) -> str:
        """Its texts alone, as people read them."""
        texts = [part for part in self.parts if part is not None]
        return texts[0] if len(texts) == 1 else " ".join(text.strip() for text in texts)

    @property
    def num_pictures(self) -> int:
        return self.parts.count(None)


@dataclass(frozen=True)
class Conversation:
    """pictures  what the row holds for each place of a picture, in the order of the turns"""

    turns: tuple[Turn, ...]
    pictures: tuple[Any, ...]


@dataclass(frozen=True)
class _Place:
    """The place of a picture in a turn; of the row's pictures the next one, where it brings none itself.

    index  of the row's pictures the one that is meant, from 0; None where none is named
    """

    picture: Any = None
    index: int | None = None


Parts = list["str | _Place"]


def question_answer(question: str, answer: str, num_pictures: int) -> tuple[Turn, ...]:
    """One question about so many pictures, and its answer."""
    return (Turn("user", (*[None] * num_pictures, question)), Turn("assistant", (answer,)))


def read_messages(value: Any, pictures: Sequence[Any], *, where: str, in_parts: bool = False) -> Conversation:
    """Pictures come with the parts that show them, or from ``pictures`` in order.

    A content that is a text shows them where it says ``<image>``.  Where no turn shows any, and what users say are
    texts, they stand at the beginning of the first question: many public sets leave the places out.

    in_parts  whether ``<image>`` is a place in a part of type text as well
    Raises    DataError  naming the row, and the turn where it is one's fault
    """
    turns, are_texts = [], True
    for number, turn in enumerate(_listed(value, where), start=1):
        role, parts = _message(turn, where=f"{where}, turn {number}")
        is_text = isinstance(_first(turn, CONTENT_KEYS), str)
        are_texts = are_texts and (is_text or role != "user")
        has_places = (is_text or in_parts) and role != "assistant"
        turns.append((role, _split_at_places(parts) if has_places else parts))
    if are_texts and pictures and not any(isinstance(part, _Place) for _, parts in turns for part in parts):
        for text in (part for role, parts in turns if role != "assistant" for part in parts):
            require_no_near_place(str(text), where=where)
        turns = _before_the_first_question(turns, len(pictures))
    return _filled(turns, pictures, where=where)


READERS: dict[str, Callable[..., Conversation]] = {
    "messages": read_messages,
    "conversations": partial(read_messages, in_parts=True),
}


def with_system(read: Conversation, text: Any, *, where: str) -> Conversation:
    """With a system's turn that stands beside the turns; nothing changes where it is null or blank.

    Raises   DataError  where it is no text, shows a picture, or the turns have another one
    """
    if text is None or (isinstance(text, str) and not is_visible(text)):
        return read
    told = required_text(text, "system's turn", where=where)
    if PLACEHOLDER in told:
        raise DataError(
            f"{where}: a system's turn beside the turns says {PLACEHOLDER}; a picture's place is in the turns alone"
        )
    require_no_other_places(told, "system", where=where)
    turn = Turn("system", (told,))
    own = [one for one in read.turns if one.role == "system"]
    if own and own != [turn]:
        raise DataError(
            f"{where}: a system's turn beside the turns, and another one among them. Set data.columns.system to null "
            "to use that among them"
        )
    return read if own else Conversation((turn, *read.turns), read.pictures)


def majority(value: Any, *, where: str) -> tuple[str, int]:
    """The answer that most of a list give, whatever its case, as first written; and how many others there are.

    value    texts, or ``{"answer": ...}`` each as in VQAv2; of equally many the first
    Raises   DataError  when there is no list, or no text in it
    """
    if isinstance(value, Mapping) and isinstance(
        value.get("answer"), list
    ):  # a list of structs, column by column
        value = value["answer"]
    if not isinstance(value, list):
        found = "missing (null)" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{where}: the answer is {found}; data.answers majority needs a list of answers")
    said = [one.get("answer") if isinstance(one, Mapping) else one for one in value]
    texts = []
    for one in said:
        if one is None or (isinstance(one, str) and not is_visible(one)):
            continue  # one of the people asked had nothing to say
        texts.append(required_text(one, "answer", where=where))
    if not texts:
        raise DataError(f"{where}: the list of {len(said)} answers holds none with a visible character")
    winner, num_votes = Counter(text.casefold() for text in texts).most_common(1)[0]
    return next(text for text in texts if text.casefold() == winner), len(said) - num_votes


def _listed(value: Any, where: str) -> list[Any]:
    if value is None:
        raise DataError(f"{where}: the conversation is missing (null)")
    if isinstance(value, Mapping):  # how older files of the library datasets hold lists of structs
        columns = {name: column for name, column in value.items() if isinstance(column, list)}
        if columns and len({len(column) for column in columns.values()}) == 1:
            value = [
                dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
            ]
    if not isinstance(value, list):
        raise DataError(f"{where}: the conversation is a {type(value).__name__}; needed is a list of turns")
    turns = [turn for one in value for turn in _of_a_pair(one)]
    if len(turns) > MAX_TURNS:
        raise DataError(f"{where}: the conversation has {len(turns):,} turns; at most {MAX_TURNS:,} are read")
    return turns


def _of_a_pair(turn: Any) -> list[Any]:
    """The two turns of ``{"user": ..., "assistant": ...}``, as The Cauldron writes them; else the turn itself."""
    if not isinstance(turn, Mapping) or not PAIR.issubset(turn) or _first(turn, ROLE_KEYS) is not None:
        return [turn]
    return [{**turn, "role": role, "content": turn[role]} for role in ("user", "assistant")]


def _message(turn: Any, *, where: str) -> tuple[Role, Parts]:
    """Role and parts of ``{"role", "content"}`` or ``{"from", "value"}``."""
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: a {type(turn).__name__}; needed is an object with role and content")
    role, content = _first(turn, ROLE_KEYS), _first(turn, CONTENT_KEYS)
    if role is None:
        raise DataError(f"{where}: no role (keys: {shortened(', '.join(map(str, turn)))})")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where}: the role is {shortened(repr(role))}; known are {', '.join(ROLES)}")
    for name in _UNUSED_KEYS:
        if not is_nothing(turn.get(name)):
            raise DataError(
                f"{where}: it has {name!r}, which is not used. Write it into the content, or take it out"
            )
    if ROLES[role] == "assistant" and (key := _not_as_it_is(turn)) is not None:
        raise DataError(
            f"{where}: its {key} is {shortened(str(turn[key]))}; single turns cannot be left out or weighed. See "
            "data.train_on"
        )
    for name in _OF_ROWS:
        if turn.get(name) is not None:
            raise DataError(
                f"{where}: it has {name!r}. A row may say that of its last answer alone, in a column beside the turns"
            )
    if content is None:
        raise DataError(f"{where}: the content is missing (null)")
    if ROLES[role] == "assistant":
        content = written_out(content, "content", where=where)
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise DataError(
            f"{where}: the content is a {type(content).__name__}; needed is a text or a list of parts"
        )
    return ROLES[role], [_part(one, where=where) for one in parts]


def _not_as_it_is(answer: Mapping[str, Any]) -> str | None:
    """The first key that says that an answer is not learned, or not with the weight of the others."""
    for name in (*_LEARNED, *_LEFT_OUT):
        value = answer.get(name)
        is_a_class = name == "label" and isinstance(value, str)  # which somebody has noted
        if is_nothing(value) or is_a_class:
            continue
        words = _NO if name in _LEFT_OUT else _YES
        if str(value).strip().lower() not in words:
            return name
    return None


def _first(turn: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Of the keys the first that is filled; None where none is."""
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _part(part: Any, *, where: str) -> str | _Place:
    """A text, or a place with the picture that the part brings; keys that are null are as good as missing."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise DataError(f"{where}: a part is a {type(part).__name__}; needed is an object with a type")
    given = {name: value for name, value in part.items() if value is not None}
    kind = given.pop("type", None)
    if kind is None:
        kind = next((name for name in ("text", "image_url", "image") if name in given), None)
    if kind in ("text", "input_text", "output_text"):
        text = given.get("text")
        if not isinstance(text, str):
            found = "missing (null)" if text is None else f"a {type(text).__name__}"
            raise DataError(f"{where}: the text of a part is {found}; needed is one text")
        if _own_picture(given, where=where) is not None:
            raise DataError(f"{where}: a part holds both a text and a picture; each needs a part of its own")
        return text
    if kind in ("image", "image_url", "input_image"):
        if isinstance(given.get("text"), str) and is_visible(given["text"]):
            raise DataError(f"{where}: a part holds both a text and a picture; each needs a part of its own")
        return _Place(_own_picture(given, where=where), _index(given.get("index"), where=where))
    raise DataError(f"{where}: a part of type {shortened(repr(kind))}; known are text, image and image_url")


def _index(value: Any, *, where: str) -> int | None:
    """A whole number, also one that a table has made a float; None where a part names no picture."""
    if is_nothing(value):
        return None
    if type(value) is int or (isinstance(value, float) and value.is_integer()):
        return int(value)
    raise DataError(f"{where}: a part's index is {shortened(repr(value))}; needed is a whole number")


def _own_picture(part: Mapping[str, Any], *, where: str) -> Any:
    """What a part of OpenAI's or Transformers' form brings; None where it only marks the place."""
    held = [name for name in _PICTURE_KEYS if not is_nothing(part.get(name))]
    if "bytes" in held and "path" in held:  # of a file that was read
        held.remove("path")
    if len(held) > 1:
        raise DataError(f"{where}: a part has a picture in {' and '.join(held)}; one is needed")
    if not held:
        other = next((name for name, value in part.items() if _may_be_a_picture(name, value)), None)
        if other is not None:
            raise DataError(
                f"{where}: a part seems to have its picture in {other!r}; known are {', '.join(_PICTURE_KEYS)}"
            )
        return None
    value = part[held[0]]
    if held[0] in ("base64", "bytes") and isinstance(value, str):
        return of_base64(value)
    if isinstance(value, Mapping) and value.get("url") is not None:
        return value["url"]
    return value


def _may_be_a_picture(name: Any, value: Any) -> bool:
    return name not in ("type", "text", "index") and (name in _SOURCE_KEYS or looks_like_pictures(value))


def _split_at_places(parts: Parts) -> Parts:
    found: Parts = []
    for part in parts:
        if isinstance(part, str):
            for number, text in enumerate(part.split(PLACEHOLDER)):
                found += [_Place(), text] if number else [text]
        else:
            found.append(part)
    return found


def _filled(turns: list[tuple[Role, Parts]], pictures: Sequence[Any], *, where: str) -> Conversation:
    places = [part for _, parts in turns for part in parts if isinstance(part, _Place)]
    num_open = sum(place.picture is None for place in places)
    if num_open != len(pictures):
        said = any(isinstance(part, str) and PLACEHOLDER in part for _, parts in turns for part in parts)
        hint = f". A {PLACEHOLDER} in a part of type text, or in an answer, is none" if said else ""
        raise DataError(
            f"{where}: {len(pictures)} picture(s) beside the turns, and {num_open} place(s) for them in the turns; "
            f"each picture needs its place, in order{hint}"
        )
    named = [place.index for place in places if place.picture is None and place.index is not None]
    if named and sorted(named) != list(range(num_open)):
        raise DataError(
            f"{where}: the places name the pictures {named} of {num_open}; each must be named once, or none"
        )
    rest = iter([pictures[index] for index in named] or pictures)
    filled = tuple(next(rest) if place.picture is None else place.picture for place in places)
    read = tuple(
        _turn(role, parts, where=f"{where}, turn {n}")
        for n, (role, parts) in enumerate(turns, start=1)
        if role != "system" or not _is_blank(parts)  # as many sets have it where there is none
    )
    _require_answered(read, where=where)
    return Conversation(read, filled)


def _before_the_first_question(turns: list[tuple[Role, Parts]], number: int) -> list[tuple[Role, Parts]]:
    first = next((place for place, (role, _) in enumerate(turns) if role == "user"), None)
    return [
        (role, [*[_Place()] * number, *parts] if place == first else parts)
        for place, (role, parts) in enumerate(turns)
    ]


def _turn(role: Role, given: Parts, *, where: str) -> Turn:
    """Blank parts are dropped but between texts; what is left is trimmed at the ends of the turn's texts."""
    shown = [isinstance(part, _Place) for part in given]
    visible = [number for number, part in enumerate(given) if isinstance(part, str) and part.strip()]
    parts: list[str | None] = [
        None if isinstance(part, _Place) else part
        for number, part in enumerate(given)
        if isinstance(part, _Place) or part.strip() or _is_between_texts(number, visible, shown)
    ]
    texts = [number for number, part in enumerate(parts) if part is not None]
    if texts:
        parts[texts[0]] = str(parts[texts[0]]).lstrip()
        parts[texts[-1]] = str(parts[texts[-1]]).rstrip()
    for part in parts:
        if part is not None:
            require_unicode(part, "text", where=where)
            require_no_other_places(part, role, where=where)
            if role != "assistant" and PLACEHOLDER in part:
                raise DataError(
                    f"{where}: a part of type text says {PLACEHOLDER}; a picture's place is a part of type image"
                )
    if role == "assistant":
        if None in parts:
            raise DataError(f"{where}: an assistant's turn shows a picture; only texts can be learned")
        parts = ["".join(part for part in parts if part is not None)]
    if None not in parts:
        required_text("".join(part for part in parts if part), "text", where=where)
    return Turn(role, tuple(parts))


def place_of_another_tool(text: str, role: Role) -> str | None:
    """The first place for something, in a form of another tool.

    What an assistant says of pictures is learned as it is: a model may have written it.
    """
    found = _OF_REGIONS.search(text) or (_OF_PICTURES.search(text) if role != "assistant" else None)
    return None if found is None else found[0].strip()


def require_no_other_places(text: str, role: Role, *, where: str) -> None:
    """Raises   DataError  where a text has a place for something, in a form of another tool"""
    if place := place_of_another_tool(text, role):
        raise DataError(
            f"{where}: a text has {shortened(place)!r}, which another tool replaces by what it stands for. Write "
            f"{PLACEHOLDER} for a picture, and names and boxes as texts"
        )


def require_no_near_place(text: str, *, where: str) -> None:
    """Of texts that show no place of a picture.

    Raises   DataError  where one has what seems to be one, as ``<Image>``
    """
    if found := _NEAR_PLACE.search(text):
        raise DataError(
            f"{where}: a text has {found[0]!r}, which is no place of a picture. Write {PLACEHOLDER} if it is one"
        )


def _is_between_texts(number: int, visible: Sequence[int], shown: Sequence[bool]) -> bool:
    """Whether texts with something to see stand before and after, and no picture in between."""
    before = max((one for one in visible if one < number), default=None)
    after = min((one for one in visible if one > number), default=None)
    return before is not None and after is not None and not any(shown[before:after])


def _is_blank(parts: Parts) -> bool:
    return all(isinstance(part, str) and not part.strip() for part in parts)


def _require_answered(turns: Sequence[Turn], *, where: str) -> None:
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise DataError(f"{where}: no assistant's turn in {len(roles)}; there is nothing to learn")
    if roles[-1] != "assistant":
        raise DataError(
            f"{where}: the last turn is the {roles[-1]}'s; the conversation must end with an assistant's. "
            "Take out what follows the last answer"
        )
    if "user" not in roles:
        raise DataError(f"{where}: no user's turn; an answer needs a question")
