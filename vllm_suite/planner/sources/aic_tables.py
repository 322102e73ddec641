"""AIConfigurator's measured tables (package `aiconfigurator-core`, Apache-2.0): where they lie, and their rows.

One folder for each system, in it one for each family of kernels, framework and version, in it Parquet files with one
row a measurement and the milliseconds in `latency`. A family that was not measured with the version asked for is served
from its newest earlier one, as AIConfigurator does; `AicTables.versions` says which answered.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vllm_suite.planner.sources.base import FloatArray, SourceError

EXTRA = "the source `aic` needs AIConfigurator's tables: pip install 'vllm-suite[aic]'"
SYSTEMS: Mapping[str, str] = {
    "A100-80G": "a100_sxm",
    "H100-SXM": "h100_sxm",
    "H200": "h200_sxm",
    "B200": "b200_sxm",
    "L40S": "l40s",
    "RTX-PRO-6000": "rtx_pro_6000_server",
}
"""The folder of each device of the planner that was measured."""


def systems_folder() -> Path:
    """The folder of all systems. Raises SourceError naming the extra where the package is not installed."""
    for package in ("aiconfigurator_core", "pyarrow"):
        if importlib.util.find_spec(package) is None:
            raise SourceError(f"{EXTRA} ({package} is not installed)")
    found = importlib.util.find_spec("aiconfigurator_core")
    assert found is not None
    assert found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations))) / "systems"


def package_version() -> str:
    """Of the installed tables."""
    from importlib.metadata import version

    return version("aiconfigurator-core")


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(each) for each in re.findall(r"\d+", version))


@dataclass
class AicTables:
    """One system's tables.

    Attributes:
        folder: of the system.
        framework: ``vllm``, ``trtllm`` or ``sglang``.
        version: of the framework.
        memory_bytes_s, launch_s: bandwidth that small kernels reach and their shortest time, as the package has them.
        peak_flops: data-sheet rates by type.
        link_bytes_s, link_s: rate and latency of a message to the next pipeline stage, as the package has them.
        nccl: version of NCCL.
        versions: by family, what answered so far.
    """

    folder: Path
    framework: str
    version: str
    memory_bytes_s: float
    launch_s: float
    peak_flops: Mapping[str, float]
    link_bytes_s: float
    link_s: float
    nccl: str
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, system: str, framework: str = "vllm", version: str | None = None, root: Path | None = None
    ) -> AicTables:
        """Tables of a system.

        Args:
            system: a device of the planner, or the package's own name of a system.
            version: None for the one that the package calls current.
            root: a folder of systems; None for the installed package's.

        Raises:
            SourceError: not installed, or no such system or version.
        """
        root = systems_folder() if root is None else root
        name = SYSTEMS.get(system, system)
        path = root / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(each.stem for each in root.glob("*.yaml") if "gpu:" in each.read_text()))
            raise SourceError(f"no AIConfigurator tables for {system}; there are {known}")
        spec: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        folder, gpu, node = root / spec["data_dir"], spec["gpu"], spec["node"]
        known_versions = sorted((each.name for each in (folder / "gemm" / framework).glob("*")), key=_order)
        if not known_versions:
            raise SourceError(f"AIConfigurator has no {framework} tables for {name}")
        if version is None:
            version = known_versions[-1]
        elif version not in known_versions:
            raise SourceError(f"{name}: {framework} {version} was not measured; there are {', '.join(known_versions)}")
        return cls(
            folder,
            framework,
            version,
            gpu["mem_bw"] * gpu["mem_bw_empirical_scaling_factor"],
            float(gpu["mem_empirical_constant_latency"]),
            {
                "bfloat16": float(gpu["bfloat16_tc_flops"]),
                "fp8": float(gpu.get("fp8_tc_flops", gpu["bfloat16_tc_flops"])),
            },
            float(node["intra_node_bw"]),
            float(node["p2p_latency"]),
            str((spec.get("misc") or {}).get("nccl_version", "")),
        )

    @property
    def system(self) -> str:
        """The package's name of it."""
        return self.folder.name

    def _path(self, family: str, file: str, maker: str | None) -> Path:
        maker = maker or self.framework
        wanted = self.nccl if maker == "nccl" else self.version
        versions = sorted((each.name for each in (self.folder / family / maker).glob("*")), key=_order, reverse=True)
        for version in versions:
            if _order(version) <= _order(wanted) and (self.folder / family / maker / version / file).is_file():
                self.versions[family if maker == self.framework else maker] = version
                return self.folder / family / maker / version / file
        raise SourceError(f"{self.system}: no {family}/{maker} table {file} of {wanted} or earlier")

    def rows(
        self, family: str, file: str, numbers: tuple[str, ...], where: Mapping[str, Any], maker: str | None = None
    ) -> FloatArray:
        """Measurements as an array of rows, ascending: the columns `numbers`, then seconds; the least of equal rows.

        Args:
            family, file: of the table.
            numbers: columns to read.
            where: columns and the value each has to have.

        Raises:
            SourceError: there is no such table. No row at all is an empty array.
        """
        path = self._path(family, file, maker)
        return _read(path, numbers, tuple(where.items()))

    def small(self, size: FloatArray) -> FloatArray:
        """Seconds of a kernel that moves `size` bytes and computes next to nothing."""
        return self.launch_s + size / self.memory_bytes_s


@lru_cache(maxsize=64)
def _read(path: Path, numbers: tuple[str, ...], where: tuple[tuple[str, Any], ...]) -> FloatArray:
    """See `AicTables.rows`; read once for all plans of a search, so the array is not to be changed."""
    # By name: pyarrow comes with the extra alone, and has no types.
    parquet = importlib.import_module("pyarrow.parquet")
    tests = [(name, "=", value) for name, value in where]
    table = parquet.read_table(path, columns=[*numbers, "latency"], filters=tests or None)
    if table.num_rows == 0:
        return np.empty((0, len(numbers) + 1))
    columns = [np.asarray(table.column(name).to_numpy(), dtype=float) for name in numbers]
    seconds = np.asarray(table.column("latency").to_numpy(), dtype=float) * 1e-3
    found = np.column_stack([*columns, seconds])
    found = found[np.lexsort(found.T[::-1])]
    first = np.concatenate([[True], np.any(np.diff(found[:, :-1], axis=0) != 0, axis=1)])
    kept = np.asarray(found[first], dtype=float)
    kept.flags.writeable = False
    return kept
