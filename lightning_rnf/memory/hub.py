"""Files of masks on the Hugging Face hub."""

from __future__ import annotations

from lightning_rnf.runtime import extras

FILE = "masks.safetensors"
"""Name of the file in a repository."""


def download(repository: str, revision: str | None = None) -> str:
    """Fetch the file of masks, or find it in the hub's cache, and return its path.

    Raises:
        ImportError: if huggingface-hub is not installed (extra ``hub``).
    """
    with extras.needed():
        from huggingface_hub import hf_hub_download

    return hf_hub_download(repository, FILE, revision=revision)


def upload(path: str, repository: str, private: bool | None = None) -> str:
    """Put a file of masks into a repository, which is made if there is none, and return the commit's address.

    Raises:
        ImportError: if huggingface-hub is not installed (extra ``hub``).
    """
    with extras.needed():
        from huggingface_hub import HfApi

    hub = HfApi(library_name="lightning_rnf")
    hub.create_repo(repository, private=private, exist_ok=True)
    commit = hub.upload_file(
        path_or_fileobj=path, path_in_repo=FILE, repo_id=repository, commit_message="Masks of finished tasks"
    )
    return str(commit.commit_url)
