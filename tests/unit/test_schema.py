"""The JSON that `autorev analyze --json` prints: versioned, documented, and read back without loss."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from autorev import analysis
from autorev.analysis import Analysis
from autorev.errors import RecordError
from tests.helpers import analysis_examples

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "analysis.schema.json").read_text())
EXAMPLES: dict[str, Callable[[], Analysis]] = {
    name: value
    for name, value in vars(analysis_examples).items()
    if callable(value) and getattr(value, "__annotations__", {}) == {"return": "Analysis"}
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_json_follows_the_schema(name: str) -> None:
    """What is printed validates against docs/analysis.schema.json."""
    text = EXAMPLES[name]().to_json()
    jsonschema.validate(json.loads(text), SCHEMA)
    assert json.loads(text)["schema_version"] == 3


@pytest.mark.parametrize("name", EXAMPLES)
def test_json_is_read_back_without_loss(name: str) -> None:
    """from_json(to_json(x)) == x."""
    assert Analysis.from_json(EXAMPLES[name]().to_json()) == EXAMPLES[name]()


def test_the_schema_documents_every_field() -> None:
    """A field that is added to the dataclasses is added to the schema, and the other way round."""
    assert len(EXAMPLES) >= 3
    assert set(SCHEMA["properties"]) == {*(f.name for f in dataclasses.fields(Analysis)), "digest"}
    for name, definition in SCHEMA["$defs"].items():
        fields = dataclasses.fields(getattr(analysis, name))
        names = {f.name.replace("class_name", "class") for f in fields}
        assert set(definition["properties"]) == names == set(definition["required"]), name


def damaged(**changes: Any) -> str:
    """A fixture's JSON with top-level fields replaced."""
    return json.dumps(json.loads(next(iter(EXAMPLES.values()))().to_json()) | changes)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"schema_version": 1, "model"', "not valid JSON"),
        ("[]", "is no record of an analysis"),
        (damaged(kind="profile"), "is no record of an analysis"),
        (damaged(schema_version=4), "schema version 4"),
        (damaged(notes=["made up"]), "was changed after it was written"),
        (damaged(model={"name": "x"}), "does not follow its schema"),
        (damaged(surprise=1), "surprise"),
    ],
)
def test_a_damaged_record_is_named(text: str, told: str) -> None:
    """Truncated, foreign, outdated and hand-edited JSON each end in a clear error."""
    with pytest.raises(RecordError, match=told):
        Analysis.from_json(text)
