"""Hardware files, clusters, collectives and transfers."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_suite.planner.hardware import HardwareError, cluster, device, devices
from vllm_suite.planner.hardware.collectives import BUSY, Collectives, CollectiveTable
from vllm_suite.planner.models import Parallel, Quantization, load
from vllm_suite.planner.sources.transfers import Transfers

MINE = """
name: My-GPU
memory_gib: 32
bandwidth_gb_s: 1000
tflops: {bf16: 100}
power: {tdp_w: 300, idle_w: 30}
node:
  gpus: 4
  nvlink: {gb_s: 100, latency_us: 2}
  nvlink_domain: 2
  pcie: {gb_s: 20, latency_us: 5}
  nic: {count: 2, gbit_s: 100, latency_us: 10}
"""

# NCCL all-reduce on 8 x H100 SXM, microseconds by bytes and GPUs, from APEX's measurements (microsoft/apex_plus, MIT).
H100_ALL_REDUCE = {
    (8 << 10, 2): 8, (8 << 10, 4): 11, (8 << 10, 8): 18, (1 << 20, 4): 20, (1 << 20, 8): 34, (16 << 20, 2): 79,
    (16 << 20, 4): 99, (16 << 20, 8): 122, (128 << 20, 2): 465, (128 << 20, 4): 611, (128 << 20, 8): 597,
}  # fmt: skip


def test_the_packages_devices() -> None:
    found = devices()
    assert set(found) == {
        "a100-80g", "h100-sxm", "h200", "b200", "l40s", "rtx-pro-6000", "rtx-4090", "cpu-2core",
    }  # fmt: skip
    for each in found.values():
        assert each.tflops["bf16"] * 1e12 / each.bandwidth > 1
        assert each.power.idle_w < each.power.tdp_w
    # A type that a device lacks falls back on bf16, as weight-only kernels do.
    assert device("A100-80G").flops("fp8") == device("a100").flops("bf16") == 312e12
    assert device("b200").flops("fp4") == 9e15


def test_a_user_adds_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    found = cluster("4x my-gpu", path)
    assert (found.gpus, found.nodes, found.device.memory_bytes) == (4, 1, 32 * 2**30)
    assert found.device.price_per_hour is None
    assert set(devices()) < set(devices(path))
    path.write_text("- " + MINE.strip().replace("\n", "\n  ").replace("My-GPU", "H200"))
    assert device("H200", path).memory_gib == 32


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("memory_gib: 32", "memory_gb: 32", r"memory_gb: Extra inputs"),
        ("tdp_w: 300", "tdp_w: -1", r"power\.tdp_w: .*greater than 0 \(got -1\)"),
        ("{bf16: 100}", "{fp8: 100}", "the rate bf16 is needed"),
        ("{bf16: 100}", "{bf16: 100, fp9: 2}", "no such rate: fp9"),
        ("name: My-GPU", "name: [", "not YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_key(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE.replace(old, new))
    with pytest.raises(HardwareError, match=says) as raised:
        devices(path)
    assert str(path) in str(raised.value)


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match="no hardware 'TPU'; known: A100"):
        device("TPU")
    for text in ("0xH200", "8", "x8"):
        with pytest.raises(HardwareError, match=r"8xH200|no hardware"):
            cluster(text)
    with pytest.raises(HardwareError, match="No such file"):
        devices(tmp_path / "none.yaml")


def test_links_follow_the_topology(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    found = cluster("8xMy-GPU", path)
    assert found.nodes == 2
    assert found.link(range(0, 2)).gb_s == 100
    assert found.link((1, 2)).gb_s == 20  # another NVLink domain
    assert found.link((0, 4)).gb_s == 2 / 4 * 100 / 8  # two cards for four GPUs
    assert cluster("16xH100-SXM").link((0, 8)).gb_s == 50


def test_collectives_near_measured_ones() -> None:
    """α–β is a rough model: within 30 % of NCCL at each of these sizes, 16 % on average."""
    found = Collectives(cluster("8xH100-SXM"))
    errors = []
    for (size, gpus), micros in H100_ALL_REDUCE.items():
        errors.append(found.seconds("all_reduce", size, range(gpus)) * 1e6 / micros - 1)
        assert abs(errors[-1]) < 0.3, (size, gpus, errors[-1])
    assert sum(map(abs, errors)) / len(errors) < 0.16


def test_collectives_are_consistent() -> None:
    found = Collectives(cluster("16xH100-SXM"))
    assert found.seconds("all_reduce", 1e6, range(1)) == 0
    for ranks in (range(8), range(16)):
        both = sum(found.seconds(kind, 1e8, ranks) for kind in ("all_gather", "reduce_scatter"))
        assert found.seconds("all_reduce", 1e8, ranks) == pytest.approx(both)
    # Over two nodes the network decides.
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p"):
        far, near = found.seconds(kind, 1e8, range(16)), found.seconds(kind, 1e8, range(8))
        assert far > near, kind


def test_an_nvlink_domain_wider_than_a_node(tmp_path: Path) -> None:
    path = tmp_path / "rack.yaml"
    path.write_text(MINE.replace("nvlink_domain: 2", "nvlink_domain: 72"))
    found = cluster("72xMy-GPU", path)
    assert found.link((0, 71)).gb_s == 100
    # Three steps of a tree at 2 us, and seven eighths of the bytes at 70 % of the rate.
    assert Collectives(found).seconds("all_gather", 1e8, range(8)) == pytest.approx(6e-6 + 7 / 8 * 1e8 / 70e9)


def test_measured_collectives_come_first(tmp_path: Path) -> None:
    path = tmp_path / "all_reduce.csv"
    path.write_text(
        "gpu,num_nodes,num_gpus_per_node,dtype,size(kb),time(us)\nX,1,8,half,1,10\nX,1,8,half,3,30\nX,2,8,half,1,99\n"
    )
    found = Collectives(cluster("8xH100-SXM"), {"all_reduce": CollectiveTable.read(path)})
    assert found.seconds("all_reduce", 1024, range(8)) == pytest.approx(10e-6)
    assert found.seconds("all_reduce", 2048, range(8)) == pytest.approx(20e-6)
    assert found.estimated == 0
    assert found.seconds("all_reduce", 4096, range(8)) > 0
    assert found.seconds("all_reduce", 2048, range(4)) > 0
    assert found.estimated == 2
    path.write_text("num_nodes,size(kb)\n1,2\n")
    with pytest.raises(HardwareError, match=r":2: .*num_gpus"):
        CollectiveTable.read(path)


def test_handing_over_takes_the_link_between() -> None:
    found = Transfers(cluster("16xH200"), setup=0)
    near, far = (found.seconds(1e9, range(0, 4), range(first, first + 4)) for first in (4, 8))
    assert far / near == pytest.approx(450 / 50, rel=0.05)
    assert found.seconds(1e9, range(0, 4), range(8, 9)) / far == pytest.approx(4, rel=0.01)
    assert Transfers(cluster("2xH200"), setup=2e-3).seconds(0, range(1), range(1, 2)) == pytest.approx(2e-3, rel=0.01)


def test_handing_over_a_cache() -> None:
    found, fp16 = Transfers(cluster("16xH200"), setup=0), Quantization.named("float16")

    def kv(name: str, source: Parallel, target: Parallel) -> float:
        """Seconds of 512 tokens between two nodes, without the latency."""
        link = found.cluster.network
        seconds = found.kv(load(name).model, fp16, 512, source=source, target=target, source_rank=0, target_rank=8)
        return seconds - link.latency_us * 1e-6

    rate = 50e9 * BUSY
    # DistServe: 512 tokens of OPT-66B are 1.13 GiB.
    assert kv("facebook/opt-66b", Parallel(), Parallel()) == pytest.approx(1.125 * 2**30 / rate, rel=1e-3)
    one = kv("facebook/opt-66b", Parallel(tp=4), Parallel(tp=4))
    assert one == pytest.approx(1.125 * 2**30 / 4 / rate, rel=1e-3)
    # The narrower side decides.
    assert kv("facebook/opt-66b", Parallel(tp=4), Parallel(tp=2)) == pytest.approx(2 * one)
    assert kv("facebook/opt-66b", Parallel(tp=2), Parallel(tp=4)) == pytest.approx(2 * one)
    assert kv("facebook/opt-66b", Parallel(tp=2, pp=2), Parallel(tp=4)) == pytest.approx(one)
    # Every rank holds MLA's rows: eight readers of one rank.
    alone = kv("deepseek-ai/DeepSeek-V3", Parallel(), Parallel())
    assert kv("deepseek-ai/DeepSeek-V3", Parallel(), Parallel(tp=8)) == pytest.approx(8 * alone)
    assert kv("deepseek-ai/DeepSeek-V3", Parallel(tp=8), Parallel(tp=8)) == pytest.approx(alone)
