"""Other models and runtimes in the benchmark: their processes, models, goals and what is said when they are missing."""

import sys

import pytest
from click.testing import CliRunner

from autotune.bench.cli import bench
from autotune.bench.peers import everything, gguf_models, llama, parts
from autotune.bench.peers.goals import goals
from autotune.bench.peers.serving import Peer, PeerError
from autotune.bench.run import Row, Run, Table

SERVER = "tests.autotune.bench.peer_process"


def test_a_call_runs_in_another_process_and_its_prints_are_no_reply():
    with Peer(sys.executable, SERVER) as peer:
        assert peer.call("double", x=[1, 2]) == [1, 2, 1, 2]
        with pytest.raises(PeerError, match="TypeError: "):
            peer.call("double", x=None)
        assert peer.call("double", x="a") == "aa", "an error does not end the process"
        with pytest.raises(PeerError, match=f"{SERVER} ended with status 3: the last words"):
            peer.call("leave")
        with pytest.raises(PeerError, match="ended with status 3"):
            peer.call("double", x=1)


def test_an_interpreter_without_llama_cpp_is_a_notice_with_the_install_line(tmp_path, monkeypatch):
    monkeypatch.setattr(llama, "MODULE", "there_is_no_such_module")
    run = Run()
    assert parts.recurrent(run, parts.Place(sys.executable, tmp_path, 1)) == []
    (notice,) = run.notices
    assert notice.startswith("llama.cpp left out: there_is_no_such_module ended with status 1: ImportError")
    assert notice.endswith(f"{sys.executable} -m pip install llama-cpp-python==0.3.36 gguf")
    assert not list(tmp_path.iterdir())


def table(name, **seconds):
    base = next(iter(seconds.values()))
    return Table(name, "", 2, "", [Row(form, x, 0.1, x / base, 0.05, 7, 28) for form, x in seconds.items()])


def test_goals_compare_rows_of_one_length_and_the_quickest_of_each_side():
    ours, theirs = parts.library("int8"), llama.LLAMA
    times = {}
    for length, mine, other in zip(parts.LENGTHS, (0.010, 0.011, 0.012), (0.015, 0.033, 0.24), strict=True):
        times |= {parts.after(ours, length): mine, parts.after(theirs, length): other}
        times[parts.after(llama.RELAID, length)] = other / 2
    prompt = {"llama.cpp F32": 5.0, "llama.cpp Q8_0": 8.0, ours: 2.0, parts.COMPILED: 4.0}
    eight = {ours: 0.02, f"Mamba-2, {theirs}": 0.03}
    tables = [table("decode int8", **times), table("prefill", **prompt), table("recurrent 8", **eight)]
    found = {goal.name: goal for goal in goals({each.name: each for each in tables})}
    measured = {name: round(goal.measured, 3) for name, goal in found.items() if goal.measured is not None}
    assert measured == {
        "decode after 128 tokens, int8, over llama.cpp's Llama": 1.5,
        "decode after 4096 tokens, int8, over llama.cpp's Llama": 3.0,
        "decode after 32768 tokens, int8, over llama.cpp's Llama": 20.0,
        "decode of 8 at once, int8, over llama.cpp's Mamba-2": 1.5,
        "prefill of 1024 tokens over llama.cpp's Llama": 2.5,
    }
    assert found["prefill of 1024 tokens over llama.cpp's Llama"].note == f"{ours} over llama.cpp F32"
    assert found["decode after 128 tokens, int8, over llama.cpp's Llama"].bound == 1.3


def test_a_part_that_fails_leaves_the_results_of_the_others(tmp_path, monkeypatch):
    def fails(run, place):
        raise PeerError("llama_decode gave 1")

    monkeypatch.setattr(everything, "PARTS", {"one": fails, "other": lambda run, place: [table("other", a=1.0)]})
    reports = list(everything.measure(Run(), parts.Place("python", tmp_path, 1), (), lambda done, of: None))
    assert [len(report.tables) for report in reports] == [1, 2], "a report after each part"
    assert reports[-1].tables[0].failed == {"all": "llama_decode gave 1"}
    assert reports[-1].tables[1].row("a").seconds == 1.0
    assert {"seconds that one took", "seconds that other took"} <= reports[-1].facts.keys()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--peers", "/there/is/no/python"], "--peers is '/there/is/no/python', which is neither"),
        (
            ["--peers", sys.executable, "--part", "lama"],
            "part 'lama' is unknown; with --peers, there are decode-float32",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(tmp_path, arguments, sentence):
    result = CliRunner().invoke(bench, ["--output", str(tmp_path / "new"), *arguments])
    assert isinstance(result.exception, ValueError)
    assert sentence in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_the_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(everything, "_BYTES", 10**15)
    with pytest.raises(OSError, match=r"GB free; the peers' weights need 1000000"):
        everything.check((), tmp_path)


def test_the_peers_models_have_as_many_parameters_as_ours():
    for architecture, layers in gguf_models.LAYERS.items():
        count = gguf_models.parameters(architecture, layers)
        assert 0.987 < count / 373_537_632 < 1.001, f"{architecture} has {count}"
