"""`megatron-llm push` against a hub that is none: what is sent, and that nothing is while a folder is not whole."""

from __future__ import annotations

import builtins
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from megatron_llm.cli.main import main
from tests.hf.folders import make_folder


class Hub:
    """Stands for HfApi; keeps what it is asked."""

    calls: list[tuple[str, Any, dict[str, Any]]]
    fails: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            type(self).calls.append((name, args, kwargs))
            if self.fails is not None:
                raise self.fails
            return SimpleNamespace(commit_url="https://huggingface.co/me/model/commit/1")

        return call


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.calls, Hub.fails = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    return Hub


def test_a_whole_folder_is_uploaded(tmp_path: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "hf")
    assert main(["push", str(tmp_path / "hf"), "me/model", "--private", "--revision", "step-100"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'hf'} -> https://huggingface.co/me/model/commit/1\n"
    names = [name for name, _, _ in hub.calls]
    assert names == ["create_repo", "create_branch", "upload_folder"]
    assert hub.calls[0] == ("create_repo", ("me/model",), {"private": True, "exist_ok": True})
    assert hub.calls[1][2] == {"branch": "step-100", "exist_ok": True}
    sent = hub.calls[2][2]
    assert (sent["repo_id"], sent["folder_path"], sent["revision"]) == ("me/model", tmp_path / "hf", "step-100")
    hub.calls.clear()
    assert main(["push", str(tmp_path / "hf"), "me/model"]) == 0
    assert [name for name, _, _ in hub.calls] == ["create_repo", "upload_folder"]
    for name, args, kwargs in hub.calls:  # the real one takes such arguments
        inspect.signature(getattr(huggingface_hub.hf_api.HfApi, name)).bind(None, *args, **kwargs)


def test_what_keeps_a_folder_here(
    tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(tmp_path), "me/model"]) == 1
    assert "has no config.json" in capsys.readouterr().err
    make_folder(tmp_path / "hf", shard="16KB")
    victim = sorted((tmp_path / "hf").glob("*.safetensors"))[-1]
    content = victim.read_bytes()
    victim.unlink()
    assert main(["push", str(tmp_path / "hf"), "me/model"]) == 1
    assert f"nothing was uploaded:\n{victim} is missing" in capsys.readouterr().err
    assert hub.calls == []
    victim.write_bytes(content)

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["push", str(tmp_path / "hf"), "me/model"]) == 1
    assert "not logged in to the Hugging Face hub: `hf auth login` once, or set HF_TOKEN" in capsys.readouterr().err
    assert hub.calls == []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")

    hub.fails = RuntimeError("403 Forbidden\n\nyou may not write to them/model")
    assert main(["push", str(tmp_path / "hf"), "them/model"]) == 1
    assert "them/model: the hub has not taken" in (said := capsys.readouterr().err) and "you may not write" in said

    plain = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["push", str(tmp_path / "hf"), "me/model"]) == 1
    assert "pip install huggingface_hub" in capsys.readouterr().err
