"""A folder to the Hugging Face hub, when it is whole. Called by `cli/push.py`."""

from __future__ import annotations

from pathlib import Path

from megatron_llm.hf.reader import HFFolder


def push(folder: str | Path, repository: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload every file of a folder to a model repository, which is made if need be, as one commit; returns its URL.

    Args:
        repository: OWNER/NAME.
        private: of a repository that is made.
        revision: a branch, made if need be; None: main.

    Raises ValueError if the folder is not whole, nobody is logged in, or the hub does not take it.
    """
    hf = HFFolder(folder)
    if problems := hf.problems():
        raise ValueError("\n".join(["nothing was uploaded:", *problems]))
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError("this needs huggingface_hub: pip install huggingface_hub") from error
    if huggingface_hub.get_token() is None:
        raise ValueError("not logged in to the Hugging Face hub: `hf auth login` once, or set HF_TOKEN to a token that may write")
    api = huggingface_hub.HfApi()
    message = f"Upload {hf.family.architecture}"
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=hf.path, revision=revision, commit_message=message)
    except Exception as error:  # of the hub, of the network: both come in many classes, which change with the library
        reason = str(error).strip().splitlines()[-1:] or [""]
        raise ValueError(f"{repository}: the hub has not taken {hf.path}: {type(error).__name__}: {reason[0]}") from error
    return str(commit.commit_url)
