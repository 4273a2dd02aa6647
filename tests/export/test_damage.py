"""An export whose files were damaged gives the right numbers, or is refused in one sentence that names the file."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from export.folder import DESCRIPTION
from export.onnx.session import OnnxSession
from export.onnx.sidecar import DIGESTED
from tests.export.conftest import Exported

IDS = torch.tensor([[3, 36, 0, 7]])
Bundle = dict[str, bytes]


@pytest.fixture
def bundle(export_named: Callable[[str], Exported]) -> Bundle:
    """The files of the smallest export."""
    return {path.name: path.read_bytes() for path in export_named("extremes").onnx.iterdir()}


@pytest.fixture
def run(bundle: Bundle, tmp_path: Path) -> Callable[[Bundle], str]:
    """Return the error that refuses an export, or "" if it gives the original results."""

    def numbers() -> torch.Tensor:
        session = OnnxSession(tmp_path, threads=1)
        prefill = session.prefill(IDS[:, :3])
        return torch.cat([prefill.logits, session.step(IDS[:, 3:], prefill.state)], dim=1)

    written: Bundle = {}

    def write(files: Bundle) -> None:
        for name in written.keys() - files.keys():
            (tmp_path / name).unlink()
        for name, content in files.items() - written.items():
            (tmp_path / name).write_bytes(content)
        written.clear()
        written.update(files)

    write(bundle)
    expected = numbers()

    def run(files: Bundle) -> str:
        write(files)
        try:
            found = numbers()
        except ValueError as error:
            sentence = str(error)
            assert sentence.startswith(str(tmp_path))
            assert "\n" not in sentence
            return sentence
        assert torch.equal(found, expected)
        return ""

    return run


def damages(name: str, content: bytes, others: Bundle) -> Iterator[bytes]:
    """A file's content cut, emptied, altered, lengthened, and another file's."""
    chance = random.Random(name)
    size = len(content)
    for end in (0, 1, size // 4, size // 2, size - 1, *(chance.randrange(size) for _ in range(5))):
        yield content[:end]
    for _ in range(20):
        at = chance.randrange(size)
        yield content[:at] + bytes([content[at] ^ chance.randrange(1, 256)]) + content[at + 1 :]
    for length in (1, 16, size):
        at = chance.randrange(size - length + 1)
        yield content[:at] + bytes(length) + content[at + length :]
        yield content[:at] + content[at + length :]
        yield content[:at] + chance.randbytes(length) + content[at:]
    yield content + b"\n"
    yield from others.values()


@pytest.mark.parametrize("name", DIGESTED)
def test_a_graph_or_weights_other_than_those_exported_are_refused(
    bundle: Bundle, run: Callable[[Bundle], str], name: str
) -> None:
    others = {other: content for other, content in bundle.items() if other != name}
    for content in damages(name, bundle[name], others):
        assert content == bundle[name] or name in run(bundle | {name: content})
    assert run(bundle) == "", "the file is right again"
    assert f"{name} is missing" in run(others)


def test_files_that_are_swapped_are_refused(bundle: Bundle, run: Callable[[Bundle], str]) -> None:
    for first in bundle:
        for second in bundle:
            assert first == second or run(bundle | {first: bundle[second], second: bundle[first]})


def test_a_damaged_description_is_refused_or_equivalent(bundle: Bundle, run: Callable[[Bundle], str]) -> None:
    others = {other: content for other, content in bundle.items() if other != DESCRIPTION}
    refused = [
        DESCRIPTION in run(bundle | {DESCRIPTION: text}) for text in damages(DESCRIPTION, bundle[DESCRIPTION], others)
    ]
    assert 30 < sum(refused) < len(refused)  # fields such as the errors of the verification may change
    assert f"it has no {DESCRIPTION}" in run(others)


def places(value: Any, *path: str | int) -> Iterator[tuple[str | int, ...]]:
    """The path of every value in a JSON document."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, *path, key)


OTHER_VALUES = (
    None, True, -1, 0, 5, 2**63, 1e300, float("nan"), "", "0", "../weights.bin", "/etc/passwd", "\n", [], [1], {},
    {"": 0},
)  # fmt: skip


def altered(value: Any, chance: random.Random) -> Any:
    """Another value of the same type, near ``value``."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value[:-1] if chance.random() < 0.5 else value + "x"
    if isinstance(value, list):
        return value[1:] if chance.random() < 0.5 else [*value, *value[:1]]
    return value | {"x": 0} if value is not None and chance.random() < 0.5 else {}


def test_every_field_of_the_description_is_checked_or_does_not_affect_results(
    bundle: Bundle, run: Callable[[Bundle], str]
) -> None:
    """Each field removed, replaced by values of other types, and altered."""
    chance = random.Random(0)
    whole = json.loads(bundle[DESCRIPTION])
    whole["largest_errors"], whole["schedules"] = (
        {"prefill of 1, batch 1": 1e-7},
        {"an op": ["a record"]},
    )  # one is enough
    outcomes = {True: 0, False: 0}
    for path in places(whole):
        for other in ("remove", "alter", *chance.sample(OTHER_VALUES, 3)):
            document = copy.deepcopy(whole)
            holder = document
            for key in path[:-1]:
                holder = holder[key]
            before = holder[path[-1]]
            if other == "remove":
                del holder[path[-1]]
            else:
                holder[path[-1]] = altered(before, chance) if other == "alter" else other
            if document == whole:
                continue
            sentence = run(bundle | {DESCRIPTION: json.dumps(document).encode()})
            outcomes[bool(sentence)] += 1
            if path[0] in ("format", "graphs", "files") or path == ("config",):
                assert sentence, f"{path} {other} was accepted"
    assert outcomes[True] > 500
    assert outcomes[False] > 20


def renewed(bundle: Bundle, changes: Bundle) -> Bundle:
    """The export with other files and matching digests."""
    files = bundle | changes
    description = json.loads(bundle[DESCRIPTION])
    description["files"] = {name: hashlib.sha256(files[name]).hexdigest() for name in DIGESTED}
    return files | {DESCRIPTION: json.dumps(description).encode()}


def elsewhere(graph: bytes, location: str) -> bytes:
    """The graph with its weights at another path."""
    model = onnx.load_from_string(graph)
    places = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    assert {entry.value for entry in places} == {"weights.bin"}
    for entry in places:
        entry.value = location
    return model.SerializeToString()


def of_a_later_onnx(graph: bytes) -> bytes:
    """The graph in an unknown version of the file format, for which onnxruntime's error has two lines."""
    model = onnx.load_from_string(graph)
    model.ir_version = 99
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (
            lambda b: {"decode.onnx": of_a_later_onnx(b["decode.onnx"])},
            r"decode\.onnx cannot be loaded by onnxruntime: ",
        ),
        (lambda b: {"weights.bin": b["weights.bin"][:-4]}, r"decode\.onnx cannot be loaded by onnxruntime: "),
        (lambda b: {"decode.onnx": b""}, r"decode\.onnx cannot be loaded by onnxruntime: "),
        (lambda b: {"prefill.onnx": b["prefill.onnx"][:5000]}, r"prefill\.onnx cannot be loaded by onnxruntime: "),
        (
            lambda b: {"decode.onnx": b["prefill.onnx"]},
            r"decode\.onnx is not the graph of ramnet\.json beside it: it has",
        ),
        (lambda b: {"decode.onnx": elsewhere(b["decode.onnx"], "../outside.bin")}, "escapes model directory"),
        (lambda b: {"decode.onnx": elsewhere(b["decode.onnx"], "sub/../../outside.bin")}, "escapes model directory"),
        (lambda b: {"decode.onnx": elsewhere(b["decode.onnx"], "/etc/passwd")}, "[Aa]bsolute path"),
    ],
    ids=[
        "a later format",
        "short weights",
        "empty",
        "cut",
        "the other graph",
        "weights outside",
        "weights outside, in and out",
        "absolute",
    ],
)
def test_damage_with_valid_digests_is_reported_by_onnxruntime_in_one_sentence(
    bundle: Bundle, run: Callable[[Bundle], str], tmp_path: Path, capfd: pytest.CaptureFixture[str],
    damage: Callable[[Bundle], Bundle], problem: str,
) -> None:  # fmt: skip
    (tmp_path.parent / "outside.bin").write_bytes(bundle["weights.bin"])
    assert re.search(problem, run(renewed(bundle, damage(bundle))))
    assert capfd.readouterr() == ("", "")
