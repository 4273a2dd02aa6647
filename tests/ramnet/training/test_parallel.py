"""Two processes compute what one does, and continue each other's runs."""

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

from ramnet.training import Recipe, checkpoint, train
from ramnet.training.footprint import held
from ramnet.training.metrics import FILE, read
from ramnet.training.parallel import Parallel, processes
from tests.ramnet.training import two_processes
from tests.ramnet.training.runs import TASK
from tests.ramnet.training.runs import fresh as recall


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i in range(4):
        (tmp_path / "data" / f"{i}.txt").write_bytes(b"%d then %d. " % (i, i + 1) * (i + 1))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    one, ddp_again, fsdp_again = Parallel(), tmp_path / "ddp", tmp_path / "fsdp"
    begun, _ = two_processes.run("ddp", tmp_path, "one", False, one)
    (tmp_path / "whole").mkdir()
    for file in (tmp_path / "one").iterdir():
        (tmp_path / "whole" / file.name).write_bytes(file.read_bytes())
    continued, metric = two_processes.run("ddp", tmp_path, "whole", True, one)

    torch.multiprocessing.start_processes(two_processes.work, (tmp_path, port), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"found{rank}") for rank in range(2)]
    for found in ranks:
        for kind in ("ddp", "fsdp"):
            assert found[kind][0] == pytest.approx(begun, rel=1e-5)
        losses, last = found["resumed"]
        assert losses == pytest.approx(continued, rel=1e-5) and last == pytest.approx(metric, rel=1e-5)
    # The rank whose loss is finite skips the step too, and weights stay the same in both.
    assert ranks[0]["skipped", 0] == ranks[1]["skipped", 1]
    assert ranks[0]["skipped", 0][0] == 1
    assert ranks[0]["share"] == held(two_processes.fresh(), 2).parameters >= ranks[1]["share"]

    expected = load_file(tmp_path / "whole" / "training.safetensors")
    resumed = load_file(tmp_path / "one" / "training.safetensors")
    assert resumed.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    for folder in (ddp_again, fsdp_again):  # runs of two processes, which one goes on with
        losses, _ = two_processes.run("ddp", tmp_path, folder.name, True, one)
        assert losses == pytest.approx(continued, rel=1e-5)
        assert [record["step"] for record in read(folder / FILE)] == [1, 2, 3, 4]


def test_processes_that_cannot_share_a_batch_equally_are_named() -> None:
    with pytest.raises(ValueError, match=r"^batch_size is 5; 2 processes need a multiple of 2$"):
        train(recall(), TASK, Recipe(steps=1, batch_size=5), parallel=Parallel(0, 2))


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Be started by torchrun alone, at the given attempt of the same run; attempt 0 is that of a new one."""
    stores: list[torch.distributed.TCPStore] = []

    def start(attempt: int) -> None:
        if attempt == 0:
            stores.append(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        for name, value in {
            "RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": stores[-1].port,
            "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": attempt,
        }.items():  # fmt: skip
            monkeypatch.setenv(name, str(value))

    return start


def test_restarted_processes_go_on_with_their_own_run_and_with_no_other(
    agent: Callable[[int], None], command_line: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def trained(steps: int) -> tuple[int, str]:
        given = ("--pairs", 1, "--length", 4, "--kernels", "reference", "--output", tmp_path / "run")
        status = command_line("train", "mqar", "--steps", steps, *given)
        said = capsys.readouterr()
        return status, said.out + said.err

    agent(0)
    assert trained(2)[0] == 0
    before = (tmp_path / "run" / checkpoint.FILE).read_bytes()
    agent(1)
    status, said = trained(3)
    assert status == 0 and "after 3 steps" in said
    assert [record["step"] for record in read(tmp_path / "run" / FILE)] == [1, 2, 3]
    (tmp_path / "run" / checkpoint.FILE).write_bytes(before)
    for attempt in range(2):
        agent(attempt)
        status, said = trained(5)
        assert status == 2 and "holds a run; continue it with --resume" in said
    assert (tmp_path / "run" / checkpoint.FILE).read_bytes() == before


def test_restarts_of_several_nodes_are_refused(agent: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    agent(0)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with processes("ddp"):
        pass
    agent(1)
    with (
        pytest.raises(ValueError, match="processes of 2 nodes; give it --max-restarts 0 and use --resume"),
        processes("ddp"),
    ):
        pass


def test_the_others_wait_for_the_first_however_long_that_takes() -> None:
    store, done = torch.distributed.HashStore(), []

    def other() -> None:
        with Parallel(1, 2, store=store).first_before_others():
            done.append("other")

    waiting = threading.Thread(target=other)
    waiting.start()
    with Parallel(0, 2, store=store).first_before_others():
        done.append("first")
    waiting.join(timeout=600)
    assert done == ["first", "other"]
