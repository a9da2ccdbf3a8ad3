"""A probe made up: what tests of advice begin with."""

from commkit.probe.report import Probe

PACES = {
    "ddp": 0.0,
    "bf16": 5e-11,
    "int8": 4e-10,
    "sign": 3e-10,
    "powersgd": 2e-10,
    "diloco": 1e-10,
}


def probe_of(link_mbit=100.0, latency_s=2e-4, nodes=4, step_s=0.5, paces=PACES, **changes):
    """Of a GPU cluster and a model of ten million parameters, unless ``changes`` say otherwise."""
    link = {"latency_s": latency_s, "bytes_per_second": link_mbit * 1e6 / 8, "spread": 0.01}
    data = {
        "version": 1,
        "commkit": "0.1.0",
        "date": "2026-11-28",
        "cluster": {
            "nodes": nodes,
            "ranks_per_node": 1,
            "backend": "gloo",
            "device": "cuda",
            "threads": 1,
            "cores": 8,
            "ranks_per_machine": 1,
        },
        "model": {
            "fingerprint": "0123456789ab",
            "matrix_numel": 10_000_000,
            "sides": 40_000,
            "matrices": 20,
            "vector_numel": 10_000,
        },
        "link": link,
        "local": None,
        "pairs": [{**link, "first": 0, "second": 1, "inside_node": False}],
        "collectives": [],
        "send_cpu_s_per_byte": 0.0,
        "compute": {
            "step_s": step_s,
            "forward_s": 0.3 * step_s,
            "backward_s": 0.6 * step_s,
            "optimizer_s": 0.1 * step_s,
            "first_bucket_s": 0.01 * step_s,
            "spread": 0.02,
        },
        "compression": [{"scheme": s, "alone": p, "each": p / 8} for s, p in paces.items()],
        "memory": {"share": 80e9, "peak": 1e9},
    }
    return Probe.model_validate({**data, **changes})
