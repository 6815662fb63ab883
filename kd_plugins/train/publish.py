"""What becomes of the networks after training: folders, model cards, repositories on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer

from ..losses.base import peer_name
from ..models.card import model_card
from ..models.export import export
from ..models.input_config import input_configs

UPLOADED = [
    *("config.json", "model*.safetensors", "model*.json", "preprocessor_config.json", "README.md"),
    *("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt"),
]


class PublishingTrainer(Trainer):
    """A Trainer of a hosted module that exports and uploads each network by itself."""

    model: Any
    train_dataset: Any
    eval_dataset: Any
    _first_batches: dict[str, dict[str, Any]]  # by kind, what the input config is checked against

    def export(
        self,
        output_dir: str | Path | None = None,
        *,
        input_config: dict[str, Any] | None = None,
        **card: Any,
    ) -> list[Path]:
        """Save each network by itself, with a model card, as ``peer_a``, ``peer_b`` ...: see
        :func:`kd_plugins.models.export`.

        The folder also says how pictures were prepared for this network: what the evaluation data
        say (``view.input_config()``), or else the training data, combined with what the network's
        input adapter does.

        Args:
            output_dir: the folder to write; ``args.output_dir`` by default.
            input_config: that of the batches, if the data cannot say it: ``input_size`` (C, H, W),
                ``mean``, ``std`` (left out for bytes), ``crop_pct``, ``interpolation``.
            **card: fields of the card's metadata, as the hub names them:
                ``license="apache-2.0"``, ``datasets=["uoft-cs/cifar100"]``.

        Raises:
            ValueError: the first evaluation batch contradicts the config that would be exported.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        folders = [folder / f"peer_{peer_name(k)}" for k in range(len(self.model.peers))]
        if self.is_world_process_zero():
            names = getattr(self.train_dataset, "class_names", None)
            configs = self._input_configs(input_config)
            for k, path in enumerate(folders):
                export(self.model.peers[k], path, names, configs[k])
                if hasattr(self.processing_class, "save_pretrained"):  # a tokenizer
                    self.processing_class.save_pretrained(path)  # type: ignore[union-attr]
                self._write_card(k, path, configs[k], card)
        return folders

    def _write_card(
        self, k: int, folder: Path, config: dict[str, Any] | None, card: dict[str, Any]
    ) -> None:
        text = model_card(self, k, input_config=config, **card)
        (folder / "README.md").write_text(text, encoding="utf-8")

    def _input_configs(self, given: dict[str, Any] | None) -> list[dict[str, Any] | None]:
        """How pictures were prepared for each network."""
        evals = self.eval_dataset
        evals = next(iter(evals.values()), None) if isinstance(evals, dict) else evals
        views = {"evaluation": evals, "training": self.train_dataset}
        adapters = self.model.inputs[: len(self.model.peers)]
        return input_configs(adapters, views, self._first_batches, given)  # type: ignore[arg-type]

    def create_model_card(self, **card: Any) -> None:
        """Write the networks and their cards: see :meth:`export`."""
        self.export(**card)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        input_config: dict[str, Any] | None = None,
        **card: Any,
    ) -> list[Any]:
        """Upload each network with its card, and nothing else, to a repository of its own.

        A repository is made if there is none. It is called ``args.hub_model_id`` (or like the
        output folder), with ``-a``, ``-b`` ... added if there are several networks. The arguments
        are those of the Trainer and of :meth:`export`; what is not given is taken from
        ``args.hub_token``, ``hub_revision`` and ``hub_private_repo``.

        Returns:
            The commit of each network, or its future with ``blocking=False``. Only the main process
            uploads; the others return nothing.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return []
        api: Any = HfApi()
        args, peers = self.args, range(len(self.model.peers))
        token = args.hub_token if token is None else token
        private = args.hub_private_repo if private is None else private
        name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
        names = [f"{name}-{peer_name(k)}" if len(peers) > 1 else name for k in peers]
        folders = self.export(input_config=input_config, **card)
        repos = [
            api.create_repo(n, token=token, private=private, exist_ok=True).repo_id for n in names
        ]
        commits, configs = [], self._input_configs(input_config)
        for k, repo, folder in zip(peers, repos, folders, strict=True):
            self._write_card(k, folder, configs[k], {"repo": repo, **card})
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=commit_message,
                token=token,
                revision=args.hub_revision if revision is None else revision,
                run_as_future=not blocking,
                allow_patterns=UPLOADED,
            )
            commits.append(commit)
        return commits
