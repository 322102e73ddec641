"""Accelerators and their nodes as data files; a user adds more in one YAML."""

from __future__ import annotations

from vllm_suite.planner.hardware.device import Cluster, Device, HardwareError, Link, Nic, Node, Power
from vllm_suite.planner.hardware.files import cluster, device, devices

__all__ = [
    "Cluster",
    "Device",
    "HardwareError",
    "Link",
    "Nic",
    "Node",
    "Power",
    "cluster",
    "device",
    "devices",
]
