"""Text as tokens of a tokenizer file, kept in files that later runs map into memory."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ramnet import RamNetConfig, RamNetForCausalLM
from ramnet.training import tokens
from ramnet.training.text import Text
from ramnet.training.tokens import Tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="the tokens are of the package tokenizers")
WORDS = {"[UNK]": 0, "ab": 1, "cd": 2, "é": 3, "e": 4}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(words(tmp_path / "tokenizer.json"), 5)


def words(path: Path) -> Path:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(path))
    return path


def files_of(folder: Path, *texts: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    return sorted(folder.iterdir())


TEXTS = ("ab cd é", "cd ab", "é é é e", "ab ab")


def test_documents_become_the_tokenizers_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = Text(files_of(tmp_path / "data", *TEXTS), 3, tokenizer=tokenizer, cache=tmp_path / "run" / "tokens")
    found = []
    for side in (text.training.tokens, text.held_out.tokens):
        assert isinstance(side.ids, np.memmap) and side.ids.dtype == np.uint16
        found += [part.tolist() for part in np.split(side.ids, np.cumsum(side.sizes.numpy())[:-1])]
    assert sorted(found) == sorted([[WORDS[word] for word in each.split()] for each in TEXTS])
    inputs, labels, *_ = text.batch(50, torch.Generator().manual_seed(0))
    assert inputs.dtype == labels.dtype == torch.int64
    assert sorted(set(labels.flatten().tolist())) == [-100, 1, 2, 3, 4]


def test_tokens_are_kept_and_made_again_when_a_file_changes(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, texts: made.append(len(texts)) or encode(self, texts))
    files, cache = files_of(tmp_path / "data", *TEXTS), tmp_path / "tokens"

    def text() -> Text:
        return Text(files, 3, tokenizer=tokenizer, cache=cache)

    first = text().describe()
    assert sum(made) == 4
    assert text().describe() == first and sum(made) == 4
    (cache / "training.tokens").write_bytes(b"\0")
    assert text().describe() == first and sum(made) == 8
    (cache / "index.json").write_text("{}")
    assert text().describe() == first and sum(made) == 12
    files[0].write_text("cd")
    assert text().describe()["digest"] != first["digest"] and sum(made) == 16


def test_tokens_are_written_whole_or_not_at_all(tmp_path: Path, tokenizer: Tokenizer) -> None:
    files = files_of(tmp_path / "data", *TEXTS)
    Text(files, 3, tokenizer=tokenizer, cache=tmp_path / "tokens")
    before = {path.name: path.read_bytes() for path in (tmp_path / "tokens").iterdir()}
    files[2].write_bytes(b"ab \xff")
    with pytest.raises(ValueError, match=r"2\.txt is not text: byte 3 is not UTF-8, which a tokenizer needs$"):
        Text(files, 3, tokenizer=tokenizer, cache=tmp_path / "tokens")
    assert {path.name: path.read_bytes() for path in (tmp_path / "tokens").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "tokenizer.json", "tokens"]


def test_a_line_of_a_jsonl_file_is_a_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps({"text": "ab " * (i + 1), "id": i}) + "\n" for i in range(41)))
    for text in (Text([file], 4, tokenizer=tokenizer, cache=tmp_path / "tokens"), Text([file], 4)):
        length = 1 if text.tokenizer else 3
        assert text.training.tokens.sizes.tolist() == [length * (i + 1) for i in range(39)]
        assert text.held_out.tokens.sizes.tolist() == [length * 40, length * 41]
    file.write_text('{"text": "ab"}\n{"body": "cd"}\n')
    with pytest.raises(ValueError, match=r'many\.jsonl line 2 is not an object with a "text"$'):
        Text([file], 4)


def test_of_a_single_document_whole_characters_are_held_out(tmp_path: Path) -> None:
    (file,) = files_of(tmp_path / "data", "é " * 6 + "aéé" + "é")  # 25 bytes, of which the last 2 are held out
    text = Text([file], 4)
    both = [bytes(side.ids) for side in (text.training.tokens, text.held_out.tokens)]
    assert [side.decode() for side in both] == ["é " * 6 + "aéé", "é"]


def test_truncation_and_padding_of_a_tokenizer_file_are_not_applied(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    made.enable_truncation(2)
    made.enable_padding(length=4)
    made.save(str(tmp_path / "cutting.json"))
    assert Tokenizer(tmp_path / "cutting.json", 5).encode(TEXTS) == tokenizer.encode(TEXTS)
    assert [len(ids) for ids in tokenizer.encode(TEXTS)] == [3, 2, 4, 2]


def test_tokens_are_made_again_when_a_file_is_renamed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The suffix says whether lines are documents, and names which files are held out."""

    def made(files: list[Path]) -> tuple[list[int], list[int]]:
        text = Text(files, 3, tokenizer=tokenizer, cache=tmp_path / "tokens")
        return text.training.tokens.sizes.tolist(), text.held_out.tokens.ids.tolist()

    files = files_of(tmp_path / "data", '{"text": "ab cd"}\n' * 5, '{"text": "é e ab"}\n')
    made(files)
    renamed = [file.rename(file.with_suffix(".jsonl")) for file in files]
    before = made(renamed)
    assert sum(before[0]) + len(before[1]) == 5 * 2 + 3
    for name in "abcdefgh":
        renamed[0] = renamed[0].rename(tmp_path / "data" / f"{name}.jsonl")
        fresh = Text(renamed, 3, tokenizer=tokenizer, cache=tmp_path / f"fresh {name}")
        assert made(renamed)[1] == fresh.held_out.tokens.ids.tolist()


def test_bits_per_byte_count_the_bytes_of_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = Text(files_of(tmp_path / "data", *["ab cd ab cd"] * 3), 2, tokenizer=tokenizer, cache=tmp_path / "tokens")
    model = RamNetForCausalLM(
        RamNetConfig(vocab_size=5, hidden_size=8, num_layers=1, num_heads=1, value_dim=4, order=2, sub_dim=2, top_k=2)
    )
    torch.nn.init.zeros_(model.head.weight)
    # A token has log2 5 bits; four tokens are 11 bytes.
    assert text.evaluate(model) == pytest.approx(math.log2(5) * 4 / 11)


def test_a_vocabulary_beyond_16_bits_is_kept_in_32(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert tokenizer.dtype == np.uint16
    tokenizer.size = 2**16 + 1
    assert tokenizer.dtype == np.uint32
    text = Text(files_of(tmp_path / "data", *TEXTS), 3, tokenizer=tokenizer, cache=tmp_path / "tokens")
    assert text.training.tokens.ids.dtype == np.uint32


def _missing(path: Path) -> None:
    path.unlink()


def _no_json(path: Path) -> None:
    path.write_text("words")


def _with_a_gap(path: Path) -> None:
    path.write_text(path.read_text().replace('"e":4', '"e":70000').replace('"e": 4', '"e": 70000'))


@pytest.mark.parametrize(
    ("damage", "vocab_size", "message"),
    [
        (_missing, 5, r"tokenizer\.json cannot be read: No such file"),
        (_no_json, 5, r"tokenizer\.json is not a tokenizer file: "),
        (_with_a_gap, 70000, r"tokenizer\.json has 70001 token ids but the model's vocabulary has only 70000$"),
        (lambda path: None, 4, r"tokenizer\.json has 5 token ids but the model's vocabulary has only 4$"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named(
    tmp_path: Path, damage: Callable[[Path], None], vocab_size: int, message: str
) -> None:
    path = words(tmp_path / "tokenizer.json")
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer(path, vocab_size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["ids", "sides", "parts"])
def test_tokens_that_were_altered_are_made_again(tmp_path: Path, tokenizer: Tokenizer, damage: str) -> None:
    files, cache = files_of(tmp_path / "data", *TEXTS), tmp_path / "tokens"
    whole = Text(files, 3, tokenizer=tokenizer, cache=cache).training.tokens.ids.tolist()
    index = json.loads((cache / "index.json").read_text())
    if damage == "ids":
        path = cache / "training.tokens"
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    elif damage == "sides":
        del index["parts"]["held-out"]
    else:
        index["parts"] = []
    (cache / "index.json").write_text(json.dumps(index))
    assert Text(files, 3, tokenizer=tokenizer, cache=cache).training.tokens.ids.tolist() == whole


def test_tokens_whose_sizes_are_cut_are_made_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    files, cache = files_of(tmp_path / "data", *TEXTS), tmp_path / "tokens"
    whole = Text(files, 3, tokenizer=tokenizer, cache=cache).training.tokens.sizes
    (cache / "training.sizes.npy").write_bytes(b"")
    assert torch.equal(Text(files, 3, tokenizer=tokenizer, cache=cache).training.tokens.sizes, whole)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "is not JSON: maximum recursion depth exceeded"),
        ('{"text": "a", "n": ' + "9" * 6000 + "}", "is not JSON: Exceeds the limit"),
        ('{"text": "\\ud800"}', "has a text that is not UTF-8"),
        ("[1]", 'is not an object with a "text"'),
    ],
)
def test_a_line_that_is_no_document_is_named_with_the_reason(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "many.jsonl"
    file.write_text('{"text": "ab"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"many.jsonl line 2 {message}"):
        Text([file], 4)


def test_few_bytes_are_tokenised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "TOGETHER", 3)
    monkeypatch.setattr(tokens, "BYTES_TOGETHER", 10)
    found = tokens._batches((str(i), b"x" * size) for i, size in enumerate([12, 4, 5, 1, 1, 1, 1, 9]))
    assert [[len(document) for _, document in several] for several in found] == [[12], [4, 5, 1], [1, 1, 1], [9]]
    assert list(tokens._batches([])) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_tokens_do_not_replace_what_others_wrote(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    kept, cache = files_of(tmp_path / "data", *TEXTS), tmp_path / "tokens"
    theirs = cache
    if kind == "folder":
        cache.mkdir()
        theirs = cache / "mine.csv"
    theirs.write_text("precious")
    said = "would be replaced, but mine.csv is not of this program" if kind == "folder" else "is a file; the tokens"
    with pytest.raises(ValueError, match=f"^{cache} {said}"):
        Text(kept, 3, tokenizer=tokenizer, cache=cache)
    assert theirs.read_text() == "precious"


def test_tokens_are_written_to_the_target_of_a_link(tmp_path: Path, tokenizer: Tokenizer) -> None:
    link = tmp_path / "tokens"
    link.symlink_to("elsewhere")
    for _ in range(2):
        Text(files_of(tmp_path / "data", *TEXTS), 3, tokenizer=tokenizer, cache=link)
        assert link.is_symlink() and (tmp_path / "elsewhere" / "index.json").is_file()
        (tmp_path / "elsewhere" / "index.json").write_text("{}")


def test_a_tokenizer_that_fails_on_a_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"ab": 0}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(ValueError, match=f"^{path} cannot tokenise the text: "):
        Text(files_of(tmp_path / "data", *TEXTS), 3, tokenizer=Tokenizer(path, 5), cache=tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_a_link_has_its_own_suffix_and_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('{"text": "ab cd"}\n{"text": "é"}\n{"text": "cd"}\n')
    link = tmp_path / "corpus.jsonl"
    link.symlink_to("blob")
    (tmp_path / "same.jsonl").symlink_to("blob")
    text = Text([link, tmp_path / "same.jsonl"], 3)
    assert text.files == [str(link)]
    assert [len(side.sizes) for side in (text.training.tokens, text.held_out.tokens)] == [2, 1]


def test_a_file_has_one_name_however_its_folder_is_spelled(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("hello " * 10)
    (tmp_path / "linked").symlink_to("folder")
    for folder in ("folder", "linked", "folder/../linked"):
        assert Text([tmp_path / folder / "a.txt"], 3).files == [str(tmp_path.resolve() / "folder" / "a.txt")]


def test_a_name_that_a_checkpoint_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    Path(path).write_text("hello")
    for names in ({"files": [path]}, {"files": [], "tokenizer": path}):
        with pytest.raises(ValueError, match=r"caf\\xe9.txt' is not UTF-8; rename it"):
            Text.check({"length": 3, **names}, 256)
    with pytest.raises(ValueError, match=r"caf\\xe9.txt' is not UTF-8; rename it"):
        Text([path], 3)
