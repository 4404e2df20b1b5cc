"""The benchmark of decoders, at a size where nothing is worth timing: what is recorded, and that failures cost a line."""

import json

import pytest
import torch

from bench import decode

pytest.importorskip("transformers")


def test_peers_are_compared_and_recorded(tmp_path, monkeypatch, capsys):
    def broken(model, prompt, total):
        raise RuntimeError("no such thing\nmore")

    def wrong(model, prompt, total):
        return lambda ids, new, streamer: torch.zeros(1, ids.shape[1] + new, dtype=torch.long)

    monkeypatch.setitem(decode.PEERS, "broken", (True, broken))
    monkeypatch.setitem(decode.PEERS, "wrong", (True, wrong))
    out = tmp_path / "decode.json"
    status = decode.main(["--model", "tiny", "--peers", "eager,graphwright,broken,wrong", "--rounds", "2", "--prompt", "8", "--new", "6", "--threads", "1",
                          "--out", str(out)])  # fmt: skip
    assert status == 0
    record = json.loads(out.read_text())
    (model,) = record["models"]
    peers = {p["peer"]: p for p in model["peers"]}
    assert {n: p["status"] for n, p in peers.items()} == {"eager": "ok", "graphwright": "ok", "broken": "failed", "wrong": "wrong"}
    assert peers["graphwright"]["same_tokens"] == 1 and peers["graphwright"]["tensor_mb"] > 0
    assert all(len(peers[n]["rounds"]) == 2 and min(map(min, peers[n]["rounds"])) > 0 for n in ("eager", "graphwright"))
    assert peers["eager"]["times_eager"] == 1 and peers["broken"]["reason"] == "RuntimeError: no such thing"
    shown = capsys.readouterr().out
    assert "| graphwright |" in shown and "- wrong: wrong" in shown


def test_names_that_do_not_exist(capsys):
    assert decode.main(["--model", "gpt9"]) == 2 and "gpt2-124m" in capsys.readouterr().err
    assert decode.main(["--list"]) == 0 and "llama-110m" in capsys.readouterr().out


def test_sizes_are_near_what_the_names_say():
    for name, low, high in (("gpt2-124m", 120e6, 130e6), ("llama-110m", 100e6, 140e6)):
        entry = next(e for e in decode.LANGUAGES if e.name == name)
        with torch.device("meta"):
            model = entry.model()
        assert low < sum(p.numel() for p in model.parameters()) < high
