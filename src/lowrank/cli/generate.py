"""Answer a prompt, with or without an adapter; greedy unless --temperature is given.

MODEL is a model folder, a name on the Hub, `embedded`, or an adapter's folder. The prompt goes
through the chat template as a user's message; without PROMPT it is read from standard input.

  lowrank generate embedded --adapter runs/intents "Where is my parcel?"
  cat letter.txt | lowrank generate embedded
"""

import argparse
import sys

from lowrank.cli.arguments import not_negative, share, whole
from lowrank.cli.evaluate import add_loading
from lowrank.cli.quantising import of_flags
from lowrank.errors import LowrankError


class PromptError(LowrankError, ValueError):
    """There is nothing to answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="- or nothing: standard input")
    parser.add_argument("--adapter", metavar="DIR", help="the adapter's folder")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument(
        "--max-new-tokens",
        "--max_new_tokens",
        type=whole(1),
        default=128,
        metavar="N",
        help="(128)",
    )
    parser.add_argument("--temperature", type=not_negative, metavar="T", help="sample; 0 is greedy")
    parser.add_argument("--top-p", "--top_p", type=share, metavar="P", help="with --temperature")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="of the sampling (42)")
    add_loading(parser)


def run(args: argparse.Namespace) -> int:
    prompt = args.prompt
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            print("Type the prompt, then Ctrl-D:", file=sys.stderr)
        prompt = sys.stdin.read().strip()
    if not prompt:
        raise PromptError("the prompt is empty: give one as an argument or on standard input")

    import torch

    from lowrank.cli.opening import base_and_adapter, model_path, open_model
    from lowrank.model_folder import load_config
    from lowrank.train.data.encode import prompt_ids
    from lowrank.train.data.render import prompt_text
    from lowrank.train.evaluate import GREEDY, generate_batch
    from lowrank.train.tasks.seq2seq import generated

    base = load_config(model_path(base_and_adapter(args.model, args.adapter)[0]))
    decodes = bool(getattr(base, "is_encoder_decoder", False))
    opened = open_model(
        args.model,
        args.adapter,
        dtype=args.dtype,
        device=args.device,
        quantisation=of_flags(args),
        task_type="SEQ_2_SEQ_LM" if decodes else "CAUSAL_LM",
    )
    template = bool(opened.tokenizer.chat_template) and not args.no_chat_template
    turns = [{"role": "user", "content": prompt}]
    if args.system:
        turns.insert(0, {"role": "system", "content": args.system})
    asked = prompt_text(turns if template or args.system else prompt, opened.tokenizer, template)
    sampling = {}
    if args.temperature:
        torch.manual_seed(args.seed)
        sampling = {"do_sample": True, "temperature": args.temperature}
        sampling |= {} if args.top_p is None else {"top_p": args.top_p}
    model, tokenizer, most = opened.model, opened.tokenizer, args.max_new_tokens
    if decodes:
        ids = tokenizer([asked])["input_ids"]
        said = generated(model, tokenizer, ids, 1, most, **(sampling or GREEDY))
    else:
        ids = prompt_ids([asked], tokenizer, template)
        said = generate_batch(model, tokenizer, ids, most, **sampling)
    print(said[0])
    return 0
