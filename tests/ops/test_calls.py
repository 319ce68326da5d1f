"""What Python packs is what native code reads: the NamedTuples of the ops' _calls.py against csrc/calls.h."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import re
import struct
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import kssm_kernels
from kssm_kernels.backends import calls, cpu

HEADER = Path(__file__).parents[2] / "csrc" / "calls.h"
TYPES = {"int64_t": int, "double": float, "uint64_t": calls.Word}


def structs() -> dict[str, list[tuple[str, str, int]]]:
    """(field, type, length of an array or 1) of every struct of the header, in order."""
    text = re.sub(r"//.*", "", HEADER.read_text())
    found = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL):
        fields = found[name] = []
        for kind, names in re.findall(r"(\w+) ([^;]+);", body):
            for field, length in re.findall(r"(\w+)(?:\[(\d+)\])?", names):
                fields.append((field, kind, int(length or 1)))
    return found


def declared() -> dict[str, Any]:
    """The NamedTuples of all modules called _calls."""
    modules = [
        m.name for m in pkgutil.walk_packages(kssm_kernels.__path__, "kssm_kernels.") if m.name.endswith("._calls")
    ]
    every = {n: v for name in modules for n, v in vars(importlib.import_module(name)).items()}
    return {
        n: v for n, v in every.items() if isinstance(v, type) and hasattr(v, "_fields") and "_calls" in v.__module__
    }


def test_every_struct_is_declared_with_its_fields_and_types() -> None:
    known = declared()
    assert structs().keys() == known.keys()
    for name, fields in structs().items():
        hints = get_type_hints(known[name])
        assert list(hints) == [field for field, _, _ in fields], name
        for field, kind, length in fields:
            want = TYPES.get(kind) or known[kind]
            got = get_args(hints[field]) if length > 1 else (hints[field],)
            assert got == (want,) * length, f"{name}.{field}"


def test_lists_name_structs_of_the_header() -> None:
    listed = re.findall(r"X\((\w+), (\w+)\)", HEADER.read_text().replace("X(name, Call)", ""))
    assert len(listed) > 10
    assert {call for _, call in listed} <= structs().keys()


def test_the_interface_s_number_is_the_header_s_hash() -> None:
    number = hashlib.sha256(HEADER.read_bytes()).hexdigest()[:12]
    assert number == calls.ABI, f'csrc/calls.h has changed: kssm_kernels/backends/calls.py wants ABI = "{number}"'


def test_fields_left_zero_are_not_given() -> None:
    from kssm_kernels.ops.kuramoto._calls import KuramotoStart, KuramotoUpdate

    assert calls.letters_of(KuramotoUpdate) == "qqdQ" + 4 * "qqqdq"
    assert calls.letters_of(KuramotoUpdate, "coupling", "phase_lag") == "qqdQ40xqqqdq40xqqqdq"
    packed = calls.packer(KuramotoStart, "row_stride")(1, 2, 3)
    assert struct.unpack("=4q", packed) == (1, 0, 2, 3)


@pytest.mark.skipif(cpu.extension is None, reason="no compiled extension here")
def test_a_call_of_another_size_is_turned_away() -> None:
    with pytest.raises(TypeError, match="order_parameters_forward: got 16 bytes, want 80"):
        cpu.extension.order_parameters_forward(bytes(16), 1)
