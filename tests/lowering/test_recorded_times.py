"""Times of a model's memory ops, from records."""

import pytest

from lowering import recorded_times
from ramnet import RamNetConfig
from schedules.records import load, shipped_path


def test_an_ops_time_is_its_records_in_proportion_to_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_times, "here", lambda: None)
    recorded = {record.workload.name: record for record in load(shipped_path("cpu"))}
    device = next(iter(recorded.values())).device
    monkeypatch.setattr(recorded_times, "cpu_name", lambda: device)
    seconds = {
        record.workload.op: record.tuned.median for record in recorded.values() if "R=32 " not in record.workload.name
    }
    config = RamNetConfig.preset("340m", num_layers=3, cape_full_layers=1, cape_half_layers=1)
    once = recorded_times.memory_ops(config, 1, 1024)
    assert once.forward == pytest.approx(3 * (seconds["address_decode"] + seconds["memory_scan"]))
    backward = seconds["address_decode_backward"] + seconds["memory_scan_backward"]
    assert once.backward == pytest.approx(3 * backward)
    assert (once.device, once.how) == (device, "measured")
    more = recorded_times.memory_ops(config, 5, 512)
    assert (more.forward, more.backward) == pytest.approx((2.5 * once.forward, 2.5 * once.backward))


def test_without_a_record_there_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_times, "here", lambda: None)
    monkeypatch.setattr(recorded_times, "cpu_name", lambda: "abacus")
    with pytest.raises(LookupError, match=r"^there is no record of address_decode U=5 P=4 K=8 float32 on abacus$"):
        recorded_times.memory_ops(RamNetConfig.preset("340m"), 1, 1024)


def test_times_of_other_code_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    old = [record.model_copy(update={"fingerprint": "0" * 12}) for record in load(shipped_path("cpu"))]
    monkeypatch.setattr(recorded_times, "here", lambda: None)
    monkeypatch.setattr(recorded_times, "cpu_name", lambda: old[0].device)
    monkeypatch.setattr(recorded_times, "known", lambda target: old)
    with pytest.raises(LookupError, match="there is no record of address_decode"):
        recorded_times.memory_ops(RamNetConfig.preset("340m"), 1, 1024)
