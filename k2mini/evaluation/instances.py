"""From a question to a scoring request: template, examples, options, and what is cut where the context is too short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from k2mini.config import EvalSection
from k2mini.data.batches import shuffled
from k2mini.data.documents import data_path, read_user_text
from k2mini.data.prompts import TEMPLATES, AnyTemplate, ChatTemplate
from k2mini.data.tokenizer import Tokenizer
from k2mini.evaluation.benchmarks import NPEE_MARK, Question
from k2mini.evaluation.score import Request, split_jointly

SCORINGS = ("letter", "text", "k2", "pmi")
NORMALIZATIONS = ("byte", "token", "none")
# LLaMA's ids of '▁A' … '▁H', '▁True' and '▁False' (github:davendw49/k2, evaluation/post_process.py).
K2_LETTERS = {"A": 319, "B": 350, "C": 315, "D": 360, "E": 382, "F": 383, "G": 402, "H": 379}
K2_WORDS = {"True": 5852, "False": 7700}
GAP = "\n\n\n"  # between examples: two blank lines, as in K2's own


@dataclass(frozen=True)
class Wording:
    """The phrases around a question: before it, before its options, and before a statement to be judged."""

    question: str = ""
    options: str = NPEE_MARK
    true_false: str = "True or false?"


@dataclass(frozen=True)
class EvalConfig:
    """How questions are asked and answers scored.

    Args:
        scoring: 'letter' lists the options and scores log p(label); 'text' asks the bare question and scores
            log p(option's text); 'k2' is K2's own: the softmax at the last position over fixed ids, for comparison with
            published figures; 'pmi' is 'text' less what the options get without the question: log p(text | question) -
            log p(text | premise), PMI_DC of Holtzman et al. 2021, arXiv 2104.08315.
        answer_prefix: the beginning of the answer, given, with the space before it where the template has one.
        normalize: of 'text': 'byte' divides by the option's length in UTF-8, 'token' in tokens, so that long options
            are not at a disadvantage; 'none' does not.
        score_end: of 'text' and 'pmi': the end of the answer is scored as well, as a tuned model writes it: EOS, or
            the token that ends it in a chat template.
        num_fewshot: examples before the question, drawn by `seed` from the same task.
        fewshot_file: a file whose text stands before every question instead.
        batch_size: questions at a time; it changes no result.
        wording: the phrases around the question, which `robust` varies.

    Raises ValueError where a value is not one of these.
    """

    scoring: str = EvalSection.scoring
    template: AnyTemplate = TEMPLATES["alpaca"]
    answer_prefix: str = EvalSection.answer_prefix
    normalize: str = "byte"
    score_end: bool = False
    num_fewshot: int = 0
    fewshot_file: str | None = None
    seed: int = 0
    batch_size: int = 16
    wording: Wording = Wording()

    def __post_init__(self) -> None:
        for name, known in (("scoring", SCORINGS), ("normalize", NORMALIZATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.num_fewshot < 0:
            raise ValueError(f"num_fewshot (--shots) must be 0 or more, not {self.num_fewshot}")
        if self.num_fewshot and self.fewshot_file is not None:
            raise ValueError("num_fewshot (--shots) and fewshot_file (--shots-file) can't be given together")
        if self.fewshot_file is not None and not data_path(self.fewshot_file).is_file():
            raise ValueError(f"there is no file of examples {self.fewshot_file}")

    @property
    def premise(self) -> str:
        """What stands between question and answer, which 'pmi' scores the options after. With template 'none' and no
        prefix it is empty, as in lm-evaluation-harness' acc_mutual_info.
        """
        return self.template.prompt("basalt").rpartition("basalt")[2] + self.answer_prefix

    @property
    def by_text(self) -> bool:
        """Whether the options' texts are scored, and not listed."""
        return self.scoring in ("text", "pmi")

    @property
    def lead(self) -> str:
        """What the template writes before an answer whose beginning is not given; it is scored with the answer."""
        return "" if self.answer_prefix else self.template.lead

    def settings(self) -> dict[str, Any]:
        """The fields that change results, under their names in report.json; batch_size is not one."""
        values: dict[str, Any] = {
            "scoring": self.scoring,
            "template": self.template.name,
            "answer_prefix": self.answer_prefix,
        }
        if self.scoring == "text":
            values["normalize"] = self.normalize
        if self.by_text:
            values["score_end"] = self.score_end
        values["shots"] = self.num_fewshot
        if self.fewshot_file is not None:
            values["shots_file"] = self.fewshot_file
        if self.num_fewshot:
            values["seed"] = self.seed
        return values

    def options(self, question: Question) -> tuple[str, ...]:
        """The texts that are scored as answers, one an option."""
        return question.texts if self.by_text else question.labels

    def instruction(self, question: Question) -> str:
        """The question as the template gets it: without its options where their texts are scored."""
        if self.template.name.startswith("k2") and question.is_true_false and self.wording == Wording():
            return question.stem  # as K2 asks
        listed = question.listed(self.wording.options, self.wording.true_false)
        if question.is_true_false:
            return listed
        return self.wording.question + (question.stem if self.by_text else listed)

    def prompt(self, question: Question, examples: Sequence[str] = ()) -> str:
        """One question after examples, up to where the answer begins. A chat has all of them in one user's turn."""
        before, asked = "".join(example + GAP for example in examples), self.instruction(question)
        if isinstance(self.template, ChatTemplate):
            return self.template.prompt(before + asked) + self.answer_prefix
        return before + self.template.prompt(asked) + self.answer_prefix

    def example(self, question: Question) -> str:
        """A question with its answer, as an example for others."""
        asked = self.prompt(question)
        if isinstance(self.template, ChatTemplate):
            asked = f"{self.instruction(question)}\n{self.answer_prefix}"
        return asked + self.options(question)[question.labels.index(question.answer)]


@dataclass
class Instance:
    """A question with the request that scores it.

    Attributes:
        request: None where no option can be scored.
        answers: what each continuation that the request scores stands for: an option's label.
        places: where these labels stand among the options; None where 'k2' scores a letter that no option has. An
            empty option is not scored.
        ids: the tokens scored of each continuation.
        dropped, cut: examples left out, and tokens cut from the left, to fit the model's context.
        prior, priors: of 'pmi': the request that scores the same options after the premise, and what came of it.
    """

    question: Question
    request: Request | None
    answers: list[str]
    places: list[int | None]
    ids: list[list[int]]
    dropped: int = 0
    cut: int = 0
    prior: Request | None = None
    priors: list[float] = field(default_factory=list)


class PromptBuilder:
    """Makes instances of one task's questions.

    Raises ValueError where there are fewer examples than asked for, or where 'k2' scoring has another tokenizer than
    LLaMA's.
    """

    def __init__(
        self, questions: Sequence[Question], config: EvalConfig, tokenizer: Tokenizer, max_seq_len: int
    ) -> None:
        self.config, self.tokenizer, self.max_seq_len = config, tokenizer, max_seq_len
        self._file = read_user_text(config.fewshot_file) if config.fewshot_file is not None else None
        self._pool = _example_pool(questions, config.seed) if config.num_fewshot else []
        if config.num_fewshot and config.num_fewshot > len(self._pool) - 1:
            raise ValueError(
                f"--shots {config.num_fewshot}: {questions[0].task} has {len(self._pool)} distinct questions to "
                "draw from, one of which may be the one that is asked"
            )
        self._groups: dict[tuple[str, ...], int] = {}
        if config.scoring == "k2":
            _check_llama(tokenizer)

    def build(self, question: Question) -> Instance:
        """The instance of one question. Where the context is short, examples are dropped from the left; where that is
        not enough, the prompt is cut from the left."""
        examples = self._examples(question)
        labels = question.labels
        if self.config.scoring == "k2":
            answers = list(K2_WORDS) if question.is_true_false else list(K2_LETTERS)[: question.k2_options()]
            places = [labels.index(answer) if answer in labels else None for answer in answers]
        else:
            scored = [place for place, text in enumerate(self.config.options(question)) if text.strip()]
            answers, places = [labels[place] for place in scored], [*scored]
        if not answers:
            return Instance(question, None, [], [], [])
        for dropped in range(len(examples) + 1):
            prefix, ids = self._encode(question, examples[dropped:], answers)
            cut = len(prefix) + max(map(len, ids)) - 1 - self.max_seq_len
            if cut <= 0:
                break
        cut = max(cut, 0)
        if cut >= len(prefix) - 1:
            raise ValueError(f"{question.task} question {question.index}: an option alone is longer than the context")
        if cut:
            kept = int(prefix[0] == self.tokenizer.bos_id)
            prefix = prefix[:kept] + prefix[kept + cut :]  # BOS stays
        group = self._groups.setdefault(tuple(examples[dropped:]), len(self._groups))
        request = Request(tuple(prefix), tuple(map(tuple, ids)), group)
        prior = None
        if self.config.scoring == "pmi":
            bare, options = self._split(question, self.config.premise)
            prior = Request(tuple(bare), tuple(map(tuple, options)))
        return Instance(question, request, answers, places, ids, dropped, cut, prior)

    def _encode(
        self, question: Question, examples: Sequence[str], answers: list[str]
    ) -> tuple[list[int], list[list[int]]]:
        """The context's tokens, and those of every continuation."""
        template = self.config.template
        try:
            context = self.config.prompt(question, examples)
        except ValueError as error:  # a chat template's
            raise ValueError(f"{question.task} question {question.index}: {error}") from None
        if self.config.scoring == "k2":
            fixed = K2_LETTERS | K2_WORDS
            ids = self.tokenizer.encode(context, bos=template.bos, eos=False, special=template.special)
            return ids, [[fixed[answer]] for answer in answers]
        return self._split(question, context)

    def _split(self, question: Question, context: str) -> tuple[list[int], list[list[int]]]:
        """The tokens of a context, and of every option after it."""
        template = self.config.template
        end = self.config.by_text and not question.is_true_false and self.config.score_end
        mark = template.end if end and isinstance(template, ChatTemplate) else ""
        texts = [self.config.lead + text + mark for text in self.config.options(question) if text.strip()]
        how = {"eos": end and not mark, "bos": template.bos, "special": template.special}
        return split_jointly(self.tokenizer, context, texts, **how)

    def _examples(self, question: Question) -> list[str]:
        if self._file is not None:
            return [self._file.rstrip("\n")]
        others = (example for example in self._pool if example.identity != question.identity)
        return [self.config.example(next(others)) for _ in range(self.config.num_fewshot)]


def _example_pool(questions: Sequence[Question], seed: int) -> list[Question]:
    """The questions that may be examples, shuffled: one of each set of copies, and none whose copies disagree."""
    copies: dict[str, list[Question]] = {}
    for place in range(len(questions)):
        question = questions[shuffled(place, len(questions), seed)]
        if question.is_answerable:
            copies.setdefault(question.identity, []).append(question)
    return [first for first, *rest in copies.values() if all(copy.answer == first.answer for copy in rest)]


def _check_llama(tokenizer: Tokenizer) -> None:
    fixed = K2_LETTERS | K2_WORDS
    if tokenizer.vocab_size < 32000 or any(tokenizer.piece(token) != f"▁{text}" for text, token in fixed.items()):
        raise ValueError(
            f"scoring 'k2' reads LLaMA's ids of the letters, which {tokenizer.path} does not have; take 'letter'"
        )
