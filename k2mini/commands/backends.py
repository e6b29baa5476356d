"""What else than k2mini's own model `eval` can score."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from k2mini.evaluation.score import OtherModel


def open_other(options: argparse.Namespace) -> OtherModel:
    """The model that --backend, --model and --url name, whose weights are not loaded yet.

    Raises ValueError where an option is not for the backend, or as the model does.
    """
    from k2mini.build import pick_device, set_threads
    from k2mini.evaluation.api_model import ApiModel
    from k2mini.evaluation.endpoint import Endpoint
    from k2mini.evaluation.transformers_model import TransformersModel

    own = ("adapter", "merge", "quantize", "quantize_head", "compile", "shard")
    odd = {"k2mini": ("url",), "transformers": (*own, "url"), "api": (*own, "dtype", "perplexity")}[options.backend]
    if given := [name for name in odd if getattr(options, name)]:
        raise ValueError(f"--{given[0].replace('_', '-')} does not go with --backend {options.backend}")
    if options.backend == "transformers":
        set_threads(options.threads)
        return TransformersModel(options.model, options.dtype, pick_device(options.device))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--backend api asks a server, --batch-size questions at a time; start one process, not ranks")
    if not options.url:
        raise ValueError("--backend api needs --url, such as http://localhost:8000/v1")
    if options.scoring == "text" and options.normalize == "token":
        raise ValueError("--normalize token does not go with --backend api, whose tokens are its own; byte does")
    if options.scoring == "pmi" and options.template == "none" and not options.answer_prefix:
        raise ValueError("--scoring pmi through an API needs text before an answer; give --answer-prefix or a template")
    return ApiModel(Endpoint(options.url, options.model))
