"""Stories as tokens: the tokenizers of the two models, the training stream and the held-out text.

Seeds keep the parts apart: training stories come from seeds below 1,000,000, held-out ones from above.
"""

import multiprocessing
import random

import grammar
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 1024
HELD_OUT_SEED = 1_000_000
CHUNK = 2_000

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Style:
    """How a model's documents are written: special tokens around a story, and whether it also chats."""

    def __init__(self, name):
        self.name = name
        if name == "llama":
            self.bos, self.eos, self.specials, self.chat = "<s>", "</s>", ["<s>", "</s>"], False
        elif name == "qwen3-moe":
            self.bos, self.eos = "", "<|endoftext|>"
            self.specials, self.chat = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], True
        else:
            raise ValueError(f"no style for {name}")

    def document(self, story):
        return self.bos + story + self.eos

    def request(self, prompt):
        """The chat template, applied to one user message."""
        return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"

    def conversation(self, prompt, story):
        return f"{self.request(prompt)}{story}<|im_end|>\n{self.eos}"


def _documents(job):
    name, seed, count = job
    style, rules, rng = Style(name), grammar.load(), random.Random(seed)
    documents = []
    for _ in range(count):
        if style.chat and rng.random() < 0.5:
            documents.append(style.conversation(*rules.write(rng, "chat")[0].split("\t")))
        else:
            documents.append(style.document(rules.write(rng)[0]))
    return documents


def training_documents(style, count):
    """`count` documents, the same ones however many processes write them."""
    jobs = [(style.name, seed, min(CHUNK, count - seed * CHUNK)) for seed in range(-(-count // CHUNK))]
    with multiprocessing.get_context("spawn").Pool() as pool:
        return [document for chunk in pool.imap(_documents, jobs) for document in chunk]


def train_tokenizer(style, documents):
    """A byte-level BPE of VOCABULARY entries; the special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=style.specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stories = documents
    for special in style.specials:
        stories = [story.replace(special, "") for story in stories]
    tokenizer.train_from_iterator(stories, trainer)
    if style.bos:
        bos = (style.bos, tokenizer.token_to_id(style.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{style.bos} $A", pair=f"{style.bos} $A $B", special_tokens=[bos]
        )
    return tokenizer


def held_out_stories(count, seed=HELD_OUT_SEED):
    return grammar.stories(seed, count)


def held_out_requests(count, seed=HELD_OUT_SEED + 1):
    """Pairs of a user's prompt and a story that answers it."""
    return [text.split("\t") for text in grammar.stories(seed, count, "chat")]
