"""The adapter of a finished stream to the Hub, with its card and the names of its classes."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import CLIPProcessor

from peft_moe_merge.inference.classes import TaskClasses, write_classes
from peft_moe_merge.selection.files import CONFIG as SELECTOR_CONFIG
from peft_moe_merge.selection.files import WEIGHTS as SELECTOR_WEIGHTS

from .data.task import Task


def prepare_push(repo_id: str) -> str:
    """Make the repository, if it is not there yet, so that a push that can't succeed fails before training.

    Args:
        repo_id: `user/name`, or a name of the user's own.

    Returns:
        `user/name`.

    Raises:
        PermissionError: there is no token, or it is not one of that user or organisation.
    """
    api = HfApi()
    try:
        me = api.whoami()
        owner, allowed = repo_id.rpartition("/")[0], {me["name"], *(org["name"] for org in me.get("orgs", []))}
        if owner and owner not in allowed:
            raise PermissionError(
                f"The token of the Hub is that of {me['name']!r}, who can't push to {repo_id!r}: its owner must be "
                f"{' or '.join(map(repr, sorted(allowed)))}."
            )
        return api.create_repo(repo_id, exist_ok=True).repo_id
    except LocalTokenNotFoundError as error:
        raise PermissionError(
            f"Pushing to {repo_id!r} needs a token of the Hub: `hf auth login`, or set HF_TOKEN."
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise PermissionError(
            f"The Hub does not let this token push to {repo_id!r}: {str(error).strip()} A token that may write comes from "
            "https://huggingface.co/settings/tokens."
        ) from error


def push_adapter(
    repo_id: str,
    checkpoint: Path,
    tasks: list[Task],
    processor: CLIPProcessor,
    card: ModelCard,
) -> str:
    """Push what `PeftModel.from_pretrained` and `ContinualClassifier.from_pretrained` need, in one commit.

    Args:
        repo_id: `user/name`.
        checkpoint: the stream's, after its last task.
        tasks: the stream, for the names of classes.
        processor: of the CLIP.
        card: of the run that the checkpoint is from, see `model_card`.

    Returns:
        The commit's address.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = json.loads((checkpoint / CONFIG_NAME).read_text())
        selector = (SELECTOR_WEIGHTS, SELECTOR_CONFIG) if config.get("selector") else ()
        for file in (SAFETENSORS_WEIGHTS_NAME, *selector):
            shutil.copy(checkpoint / file, folder)
        config["base_model_name_or_path"] = card.data.base_model  # a folder here is of no use elsewhere
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True))
        write_classes(folder, {task.name: TaskClasses(task.class_names, task.templates) for task in tasks})
        processor.save_pretrained(folder)
        card.save(folder / "README.md")
        commit = HfApi().upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=f"Adapter after {len(tasks)} tasks"
        )
    return commit.commit_url
