# Copyright 2026 The diffusers-dim authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What pipelines do with the Hub."""

import os
import tempfile
from pathlib import Path
from typing import Any

from .code import PIPELINES, name_by_library, save_code, use_package_classes


class DIMHubMixin:
    r"""
    Saves and uploads a pipeline with the code by which diffusers alone loads it, and loads such folders and
    repositories by this package's own classes: of the code in them nothing is run, and none has to be trusted.
    """

    name_or_path: str

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """[`~ConfigMixin.load_config`], with this package's classes in the place of code in the folder."""
        found = super().load_config(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        if isinstance(found, tuple):
            return use_package_classes(found[0]), *found[1:]
        return use_package_classes(found)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        # `download` reads `model_index.json` by this. It would run the code that a list for a class names, and ask the
        # repository for modules that are no library's.
        return name_by_library(super()._dict_from_json_file(json_file))  # type: ignore[misc]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        self_contained: bool = True,
        **kwargs: Any,
    ) -> None:
        r"""
        Saves the pipeline to a folder that [`~DIMPipeline.from_pretrained`] loads and, without this package and with
        `trust_remote_code=True`, [`~diffusers.DiffusionPipeline.from_pretrained`].

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to save to, made if it is not there.
            safe_serialization (`bool`, defaults to `True`):
                Whether weights are saved as safetensors or pickled; pickled ones are not uploaded.
            variant (`str`, *optional*):
                Goes into the weights' file names, such as "bf16"; a later load has to name it.
            max_shard_size (`int` or `str`, *optional*):
                Most bytes in one file of weights, such as "5GB".
            push_to_hub (`bool`, defaults to `False`):
                Whether to upload the folder, see [`~DIMPipeline.push_to_hub`].
            self_contained (`bool`, defaults to `True`):
                Whether the folder gets the code that loads it without this package.
            kwargs (*optional*):
                With `push_to_hub` its `repo_id` (the folder's name by default), `model_card`, `private`, `token`,
                `commit_message` and `create_pr`.

        Raises:
            ValueError: See [`~DIMPipeline.push_to_hub`].
        """
        if push_to_hub and not safe_serialization:
            raise ValueError("Only safetensors are uploaded: leave `safe_serialization` at True.")
        repo_id = kwargs.pop("repo_id", None) or os.path.basename(os.path.abspath(save_directory))
        model_card = kwargs.pop("model_card", None)
        if push_to_hub:
            from .upload import complete_card

            # A card that is refused is refused before gigabytes are written.
            os.makedirs(save_directory, exist_ok=True)
            complete_card(Path(save_directory), model_card, self.name_or_path, repo_id)
        super().save_pretrained(  # type: ignore[misc]
            save_directory,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            **({} if push_to_hub else kwargs),
        )
        if self_contained and type(self).__name__ in PIPELINES:
            save_code(Path(save_directory))
        if push_to_hub:
            from .upload import upload

            upload(Path(save_directory), repo_id, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        model_card: str | os.PathLike | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        r"""
        Saves the pipeline as [`~DIMPipeline.save_pretrained`] does and uploads it with a model card.

        Args:
            repo_id (`str`):
                The repository, made if it is not there.
            model_card (`str` or `os.PathLike`, *optional*):
                A file with its model card. By default `README.md` of the folder that the pipeline was loaded from, or
                else the card that the repository has.
            commit_message (`str`, *optional*):
                What the commit says.
            private (`bool`, *optional*):
                Whether a new repository is private.
            token (`str`, *optional*):
                By default that of `HF_TOKEN` or of `hf auth login`.
            create_pr (`bool`, defaults to `False`):
                Whether to open a pull request instead.
            variant (`str`, *optional*):
                See [`~DIMPipeline.save_pretrained`].
            max_shard_size (`int` or `str`, *optional*):
                See [`~DIMPipeline.save_pretrained`].
            kwargs (*optional*):
                `safe_serialization`, which has to be `True`.

        Raises:
            ValueError: If there is no model card, or it lacks what has to be in one (see [`validate_model_card`]), or
                `safe_serialization` is off.
        """
        if unknown := sorted(set(kwargs) - {"safe_serialization"}):
            raise ValueError(f"push_to_hub of a pipeline has no arguments {unknown}.")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(
                folder,
                variant=variant,
                max_shard_size=max_shard_size,
                push_to_hub=True,
                repo_id=repo_id,
                model_card=model_card,
                private=private,
                token=token,
                commit_message=commit_message,
                create_pr=create_pr,
                **kwargs,
            )
