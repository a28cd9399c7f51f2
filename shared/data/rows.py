"""The examples: rows of a data set as conversations about pictures, checked one by one as they are read.

    train = open_split(recipe.data, "train")
    example = train[0]      # Example(images=(b"\\xff\\xd8...",), turns=(Turn("user", ...), ...), ...)
    example.question, example.answer        # the last ones

Pictures stay encoded here (``shared.data.images`` decodes them), since their bytes are part of an example's
identity.  ``shared.data.conversations`` knows what a row may look like.  A row that cannot be used raises
``DataError`` with its split and number; whoever reads decides whether it may be left out, and counts it.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

from shared.data.answer_ids import given_ids
from shared.data.conversations import (
    FORMS,
    PLACEHOLDER,
    READERS,
    Conversation,
    Form,
    Turn,
    majority,
    question_answer,
    read_messages,
    require_no_near_place,
    require_no_other_places,
    with_system,
)
from shared.data.pictures import (
    Picture,
    PictureFile,
    is_nothing,
    listed_pictures,
    looks_like_pictures,
    read_picture,
)
from shared.data.sources import Rows, choose, open_rows
from shared.data.texts import is_visible, require_unicode, required_text
from shared.data.written import Written, answers_in, lay_over
from shared.errors import DataError, shortened
from shared.recipes import DataConfig, Split

PICTURE_COLUMNS = ("images", "image")  # beside the recipe's own
OPTIONAL = ("kind", "case", "system", "answer_ids", "answer_end", "written_by")
OF_A_PROMPT = ("history", "input", "inputs")  # columns that hold parts of it in formats of other tools
OTHER_MEDIA = ("video", "videos", "audio", "audios")  # columns that no row may fill
# Names of columns whose texts are pictures, whatever they look like: image_path, imageUrl, img_b64.
_NAMES_PICTURES = re.compile(
    r"(image|img|picture|photo)s?([ _-]?(path|file|name|url|uri|link|base64|b64|bytes|data|str)s?)*",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"(.*[^\d _-])[ _-]?\d{1,2}")  # one of several columns, as image_1 and image_2
_TEXT_COLUMNS: dict[str, tuple[str, ...]] = {
    "question_answer": ("question", "answer"),
    "messages": ("messages",),
    "conversations": ("conversations",),
}


@dataclass(frozen=True)
class Example:
    """One row: encoded picture files, the conversation about them, where it comes from.

    turns        end with an assistant's; their pictures' places take ``images`` in order
    answer_ids   of the last answer, as its writer's tokenizer has them; None: as a tokenizer cuts its text
    answer_end   whether the last answer is whole; an answer that was cut is learned without the end of its turn
    written_by   which model wrote the last answer, and how, as its set says; "" where none did
    num_outvoted answers of the row that are not used, where it holds a list of them
    files        those that pictures were read from, as they were then
    """

    images: tuple[bytes, ...]
    turns: tuple[Turn, ...]
    kind: str = ""  # where the question comes from, or "": results are reported by it
    case: str = ""  # or ""
    index: int = 0  # the row in its split
    where: str = field(default="", compare=False)  # how messages name it
    form: Form = field(default="question_answer", compare=False)
    answer_ids: tuple[int, ...] | None = None
    answer_end: bool = True
    written_by: str = field(default="", compare=False)
    num_outvoted: int = field(default=0, compare=False)
    files: tuple[PictureFile, ...] = field(default=(), compare=False)

    @classmethod
    def single(cls, image: bytes, question: str, answer: str, **rest: Any) -> Self:
        """One question about one picture; ``rest`` as the fields."""
        return cls((image,), question_answer(question, answer, 1), **rest)

    @property
    def question(self) -> str:
        """The text of the last user's turn."""
        return next(turn.text for turn in reversed(self.turns) if turn.role == "user")

    @property
    def answer(self) -> str:
        return self.turns[-1].text

    @property
    def pictures_sha256(self) -> str:
        """Hex: of the picture's file; of several, of their hashes; a row of text alone stands for itself."""
        if len(self.images) == 1:
            return hashlib.sha256(self.images[0]).hexdigest()
        parts = [hashlib.sha256(image).digest() for image in self.images] or [repr(self.turns).encode()]
        return hashlib.sha256(b"".join(parts)).hexdigest()


@dataclass(frozen=True)
class VqaSplit:
    """A split of a data set; memory-mapped, so cheap to open and to send to data-loader workers.

    forms     those that its columns allow; of several each row has its own
    columns   field of a row -> column, for those that the data set has
    pictures  columns that hold pictures, the first that is filled counts
    numbered  of those the ones that are numbered like another column, with that: ``image_1`` with ``image_2``
    unused    the other columns of the data set
    beside    rows of these columns, to see that no picture is lost; None: ``rows`` has them, or there are none
    written   answers that rows have in place of their own; None without ``data.written``
    """

    source: str
    name: str
    rows: Rows
    forms: tuple[Form, ...]
    columns: dict[str, str]
    pictures: tuple[str, ...]
    unused: tuple[str, ...]
    settings: DataConfig
    num_examples: int
    written: Written | None = None
    beside: Rows | None = None
    numbered: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.num_examples

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        """Raises   DataError  when the row has no usable picture, question or answer."""
        if not 0 <= index < self.num_examples:
            raise IndexError(f"row {index} of a split of {self.num_examples}")
        if self.written is not None and (found := self.written.find(index)) is not None:
            answers, number = found
            return replace(answers[number], index=index)
        where = self.where(index)
        row = self.rows[index]
        value = {field: row.get(column) for field, column in self.columns.items()}
        form = self._form_of(value, where)
        read, num_outvoted = self._read(form, row, value, index)
        ids, is_whole = given_ids(value, where=where)
        pictures = self._pictures(read.pictures, row, index)
        return Example(
            images=tuple(picture.data for picture in pictures),
            turns=read.turns,
            kind=_label(value.get("kind"), "kind", where),
            case=_label(value.get("case"), "case", where),
            index=index,
            where=where,
            form=form,
            answer_ids=ids,
            answer_end=is_whole,
            written_by=_label(value.get("written_by"), "written_by", where),
            num_outvoted=num_outvoted,
            files=tuple(picture.file for picture in pictures if picture.file is not None),
        )

    @cached_property
    def system_column(self) -> str | None:
        """Of system's turns beside questions and answers of texts; it may hold anything until it is named."""
        return self.columns["system"] if "system" in _named(self.settings) & {*self.columns} else None

    def where(self, index: int) -> str:
        """How messages name a row."""
        return f"{self.source}, split {self.name}, row {index}"

    def row_of(self, message: str) -> int | None:
        """The row that a message begins with, as ``where`` names it."""
        found = re.match(re.escape(self.where(0).removesuffix("0")) + r"(\d+)\b", message)
        return None if found is None else int(found[1])

    def _form_of(self, value: Mapping[str, Any], where: str) -> Form:
        if len(self.forms) == 1:
            return self.forms[0]
        filled = [
            form for form in self.forms if any(value.get(name) is not None for name in _TEXT_COLUMNS[form])
        ]
        if len(filled) == 1:
            return filled[0]
        known = ", ".join(self.columns[name] for form in self.forms for name in _TEXT_COLUMNS[form])
        if not filled:
            raise DataError(f"{where}: all of {known} are missing (null); one form of a row is needed")
        raise DataError(
            f"{where}: it fits {' and '.join(filled)} (columns {known}). Set data.format to the one that is meant"
        )

    def _read(
        self, form: Form, row: Mapping[str, Any], value: Mapping[str, Any], index: int
    ) -> tuple[Conversation, int]:
        """The conversation, and how many answers it leaves out."""
        where = self.where(index)
        for name in OTHER_MEDIA:
            if row.get(name) and not is_nothing(row[name]):
                raise DataError(f"{where}: it has something in {name!r}; pictures and texts alone are used")
        held = self._held(row, where)
        pictures = listed_pictures(held)
        turns = value.get(form) if form != "question_answer" else _in_two_columns(value)
        if turns is not None or form != "question_answer":
            reader = READERS["messages" if form == "question_answer" else form]
            read = reader(turns, pictures, where=where)
            if held is None and not read.pictures:
                self._require_none_lost(row, index)
            return with_system(read, value.get("system"), where=where), 0
        if held is None:
            self._require_text_alone(row, index)
        read, num_outvoted = self._question_answer(row, value, pictures, where)
        system = None if self.system_column is None else row.get(self.system_column)
        return with_system(read, system, where=where), num_outvoted

    def _question_answer(
        self, row: Mapping[str, Any], value: Mapping[str, Any], pictures: list[Any], where: str
    ) -> tuple[Conversation, int]:
        answer, num_outvoted = value["answer"], 0
        is_written = isinstance(answer, str) and value.get("answer_ids") is not None
        if self.settings.answers == "majority" and not is_written:
            answer, num_outvoted = majority(answer, where=where)
        elif isinstance(answer, list):
            raise DataError(
                f"{where}: the answer is a list; needed is one text, or data.answers majority: what most of them say"
            )
        _require_whole_prompt(row, self.columns["question"], where=where)
        question = required_text(value["question"], "question", where=where)
        answer = required_text(answer, "answer", where=where)
        if PLACEHOLDER in question:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return read_messages(turns, pictures, where=where), num_outvoted
        if pictures:
            require_no_near_place(question, where=where)
        require_no_other_places(question, "user", where=where)
        require_no_other_places(answer, "assistant", where=where)
        return Conversation(question_answer(question, answer, len(pictures)), tuple(pictures)), num_outvoted

    def _held(self, row: Mapping[str, Any], where: str) -> Any:
        """What the row's picture column holds; None where none is filled."""
        filled = self._filled(row)
        if len(filled) > 1 and filled[0] != self.settings.columns.image:
            raise DataError(
                f"{where}: pictures in the columns {' and '.join(filled)}. Set data.columns.image to one of them"
            )
        others = self.numbered.get(filled[0], ()) if filled else ()
        if also := [name for name in others if not (is_nothing(row.get(name)) or _is_number(row[name]))]:
            raise DataError(
                f"{where}: pictures in the columns {', '.join([filled[0], *also])}, and one column is used. Make a "
                "column with a list of them, or take the others out"
            )
        return row[filled[0]] if filled else None

    def _filled(self, row: Mapping[str, Any]) -> list[str]:
        """Picture columns that hold something; else one with an empty list; else those with numbers."""
        filled = [name for name in self.pictures if not _is_missing(row.get(name))]
        lists = [name for name in filled if not _is_number(row[name])]
        return [name for name in lists if row[name] != []] or lists[:1] or filled

    def _pictures(self, named: Sequence[Any], row: Mapping[str, Any], index: int) -> list[Picture]:
        where, folder, several = self.where(index), self.rows.folder_of(index), len(named) > 1
        try:
            return [
                read_picture(one, folder, where=f"{where}, picture {number}" if several else where)
                for number, one in enumerate(named, start=1)
            ]
        except DataError as error:
            filled = self._filled(row)
            if len(filled) < 2 and not (filled and _is_number(row[filled[0]])):
                raise
            used, *others = filled
            beside = f" The row has {' and '.join(others)} too." if others else ""
            raise DataError(
                f"{error}.{beside} It is from the column {used}: set data.columns.image to the pictures' own"
            ) from error

    def _require_text_alone(self, row: Mapping[str, Any], index: int) -> None:
        """Of a question without a picture: whether it may have none."""
        self._require_none_lost(row, index)
        if self.settings.text_only or not self.pictures:
            return
        is_null = any(name in row for name in self.pictures)
        if is_null or self.forms == ("question_answer",):
            known = "" if is_null else f": no {' or '.join(self.pictures)} among {shortened(', '.join(row))}"
            raise DataError(
                f"{self.where(index)}: the picture is missing{known or ' (null)'}. If rows may be of text alone, set "
                "data.text_only to true"
            )

    def seen_beside(self, index: int) -> list[str]:
        """Columns that are not used and seem to hold pictures in this row."""
        others = self.rows[index] if self.beside is None else self.beside[index]
        return [name for name in self.unused if _holds_pictures(name, others.get(name))]

    def _require_none_lost(self, row: Mapping[str, Any], index: int) -> None:
        """Of a row without a picture: that no other column seems to hold one."""
        if self.settings.columns.image is None or (
            self.settings.text_only and "image" in _named(self.settings)
        ):
            return
        others = row if self.beside is None else {**row, **self.beside[index]}
        if (found := _unused_pictures(others, {*self.columns.values(), *self.pictures})) is not None:
            raise DataError(
                f"{self.where(index)}: no picture is used, but {found!r} seems to hold one. Set data.columns.image "
                "to its column, or to null where rows are of text alone"
            )


def open_split(data: DataConfig, split: Split) -> VqaSplit:
    """Opens the train, validation or test split of ``data``, its first ``data.limit`` rows if that is set.

    Raises   DataError  when the source, the split or a column is missing, or the split has no rows.
    """
    given = _open_given(data, split)
    folders = [folder for folder in data.written or () if answers_in(folder, given.name)]
    if not folders:
        return given
    own = {"revision": None, "config": None, "limit": None, "written": None}
    sets = [_open_given(data.model_copy(update={"source": folder, **own}), split) for folder in folders]
    return replace(given, written=lay_over(given, sets))


def _open_given(data: DataConfig, split: Split) -> VqaSplit:
    """The rows of ``data.source``, with their own answers."""
    name = getattr(data.splits, split)
    if name is None:
        raise DataError(f"data.splits.{split} is null: {data.source} is said to have no {split} split")
    others = [other for other in data.splits.model_dump().values() if other is not None]
    rows = open_rows(data.source, split=name, revision=data.revision, config=data.config, splits=others)
    if len(rows) == 0:
        raise DataError(f"{data.source}, split {name}: no rows; at least one is needed")
    forms = _forms(data, rows)
    columns, pictures = _columns(data, rows, forms)
    if not pictures:
        _require_no_picture(data, rows, {*columns.values()})
    numbered = _numbered_like(pictures, [name for name in rows.columns if name not in columns.values()])
    looked_at = {name for name in (*OTHER_MEDIA, *OF_A_PROMPT) if name in rows.columns}
    looked_at.update(*numbered.values())
    used = {*columns.values(), *pictures}
    unused = tuple(name for name in rows.columns if name not in {*used, *OTHER_MEDIA})
    number = min(len(rows), data.limit or len(rows))
    chosen, beside = rows.select(sorted(used | looked_at)), rows.select(list(unused))
    lacks_some = bool(unused) and chosen is not rows
    return VqaSplit(
        *(data.source, name, chosen, forms, columns, pictures, unused, data, number),
        beside=beside if lacks_some else None,
        numbered=numbered,
    )


def _forms(data: DataConfig, rows: Rows) -> tuple[Form, ...]:
    """The recipe's; else those whose columns it names; else those whose columns are there.

    Where there is none, that of a conversation in a column of nearly its name, or question and answer: what is
    missing of it tells most.
    """
    if data.format is not None:
        return (data.format,)
    named = _named(data)
    if asked := tuple(form for form in FORMS if named.intersection(_TEXT_COLUMNS[form])):
        return asked
    names = data.columns.model_dump()
    found = tuple(form for form in FORMS if all(names[name] in rows.columns for name in _TEXT_COLUMNS[form]))
    if found or {names["question"], names["answer"]}.intersection(rows.columns):
        return found or ("question_answer",)
    near = (form for form in FORMS[1:] if difflib.get_close_matches(names[form], rows.columns, cutoff=0.8))
    return (next(near, "question_answer"),)


def _columns(data: DataConfig, rows: Rows, forms: tuple[Form, ...]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The column of each field of the forms, and the columns of pictures.

    Columns of ``OPTIONAL`` fields may be missing unless others are asked for; so may pictures in conversations.
    """
    names, asked = data.columns.model_dump(), _named(data)
    columns = {name: names[name] for form in forms for name in _TEXT_COLUMNS[form]}
    columns |= {
        name: names[name]
        for name in OPTIONAL
        if names[name] is not None and (name in asked or names[name] in rows.columns)
    }
    is_named = "system" in asked or forms != ("question_answer",)
    if "system" in columns and not is_named and not _asks_in_turns(rows, names["question"]):
        del columns["system"]
    pictures = [name for name in (names["image"], *PICTURE_COLUMNS) if name in rows.columns]
    if "image" in asked or (not pictures and forms == ("question_answer",) and not data.text_only):
        pictures = [] if names["image"] is None else [names["image"]]
    problems = []
    for name, column in (*columns.items(), *(("image", column) for column in pictures)):
        try:
            is_there = name != "image" or column in rows.columns
            remedy = "" if is_there else _remedy(rows, {*columns.values()})
            choose(column, rows.columns, what=f"{data.source}: data.columns.{name}: column", remedy=remedy)
        except DataError as error:
            problems.append(str(error))
    if problems:
        if forms == ("question_answer",) and not {names["question"], names["answer"]}.intersection(
            rows.columns
        ):
            problems.append("Or name a column of conversations as data.columns.messages or .conversations")
        raise DataError("\n".join(problems))
    return columns, tuple(dict.fromkeys(pictures))


def _asks_in_turns(rows: Rows, question: str) -> bool:
    """Whether the questions are lists of turns, as the first row shows."""
    if question not in rows.columns:
        return False
    try:
        return _are_turns(rows.select([question])[0][question])
    except DataError:  # whoever reads the row says so
        return False


def _require_no_picture(data: DataConfig, rows: Rows, used: set[str]) -> None:
    """Raises   DataError  when a set without picture columns has one by another name, as its first row shows"""
    if data.columns.image is not None and (found := _first_pictures(rows, used)) is not None:
        raise DataError(
            f"{data.source}: no column {', '.join((data.columns.image, *PICTURE_COLUMNS))}, but {found!r} seems to "
            "hold pictures. Set data.columns.image to it, or to null where rows are of text alone"
        )


def _remedy(rows: Rows, used: set[str]) -> str:
    """What to do where a column of pictures is not there."""
    if (found := _first_pictures(rows, used)) is not None:
        return f"{found!r} seems to hold pictures"
    return "Set it to null where rows are of text alone"


def _first_pictures(rows: Rows, used: Collection[str]) -> str | None:
    """The first column that seems to hold pictures and is not used, as the first row shows."""
    likely = [name for name in rows.columns if name not in used]
    try:
        return _unused_pictures(rows.select(likely)[0], used) if likely else None
    except DataError:  # whoever reads the row says so
        return None


def _unused_pictures(row: Mapping[str, Any], used: Collection[str]) -> str | None:
    """The first column that seems to hold pictures and is not used."""
    return next(
        (name for name, value in row.items() if name not in used and _holds_pictures(name, value)), None
    )


def _holds_pictures(name: str, value: Any) -> bool:
    """Whether a cell seems to hold pictures, by what it is or by its column's name."""
    if looks_like_pictures(value):
        return True
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, str) and bool(first.strip()) and _NAMES_PICTURES.fullmatch(name) is not None


def _numbered_like(pictures: Collection[str], others: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Of columns of pictures those that have others numbered as they are, as ``image_1`` has ``image_2``."""
    stems = {
        name: found[1] if (found := _NUMBERED.fullmatch(name)) else name for name in (*pictures, *others)
    }
    alike = {
        name: tuple(other for other in others if other not in pictures and stems[other] == stems[name])
        for name in pictures
    }
    return {name: found for name, found in alike.items() if found}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_missing(pictures: Any) -> bool:
    """Whether a cell has nothing where a picture may be; an empty list says that there is none."""
    return pictures != [] and is_nothing(pictures)


def _in_two_columns(value: Mapping[str, Any]) -> list[Any] | None:
    """The turns of a row whose question and answer are lists of them, as TRL has prompt and completion."""
    question, answer = value["question"], value["answer"]
    if not (_are_turns(question) and _are_turns(answer)):
        return None
    return [*question, *answer]


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def _require_whole_prompt(row: Mapping[str, Any], question: str, *, where: str) -> None:
    """Raises   DataError  where other columns hold parts of the prompt, as other tools' formats have them"""
    if isinstance(row.get("history"), list) and row["history"]:
        raise DataError(
            f"{where}: it has earlier turns in 'history'; put all turns into one column of messages"
        )
    for name in ("input", "inputs"):
        more = row.get(name)
        if question == "instruction" and isinstance(more, str) and is_visible(more):
            raise DataError(
                f"{where}: {name!r} belongs to the instruction; write both into one column of questions"
            )


def _named(data: DataConfig) -> set[str]:
    """Columns that the recipe names otherwise than it would by default: a resolved recipe writes them all out."""
    fields = type(data.columns).model_fields
    return {name for name, column in data.columns.model_dump().items() if column != fields[name].default}


def _label(value: Any, what: str, where: str) -> str:
    text = "" if value is None else str(value)
    require_unicode(text, what, where=where)
    return text
