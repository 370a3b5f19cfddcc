"""Fixtures shared by all tests (tiny models, a chat file, a private cache, a Ray), and the limits of unit tests."""

import gc
import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tests.support.refusals import Refuses, Write
    from tests.support.shared_ray import SharedRay

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
NUM_CHAT_ROWS = 96
PLACES = ("harbour", "market", "library", "garden", "station", "bakery", "museum", "bridge")
COLOURS = ("red", "green", "blue", "yellow", "white", "black")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("unit_cpu_seconds", "CPU time that the call of a unit test may use", default="5")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from tests.support.tiers import arrange

    arrange(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    from tests.support.tiers import check_cpu, cpu_seconds

    before = cpu_seconds()
    yield
    check_cpu(item, cpu_seconds() - before)


def chat_rows() -> list[dict[str, str]]:
    """Rows that a tiny model can learn something from: the completion repeats words of the prompt."""
    rows = []
    for index in range(NUM_CHAT_ROWS):
        place, colour = PLACES[index % len(PLACES)], COLOURS[(index // len(PLACES)) % len(COLOURS)]
        rows.append(
            {
                "prompt": f"Which door has the {place} number {index}? The {colour} one?",
                "completion": f" Yes, the {place} has a {colour} door.",
            }
        )
    return rows


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A private cache for the tests, except for the embedded model: its slow conversion stays in the user's cache."""
    from loragrid.models.cache import cache_folder

    kept_models = cache_folder() / "models"
    kept_models.mkdir(parents=True, exist_ok=True)
    folder = tmp_path_factory.mktemp("cache")
    (folder / "models").symlink_to(kept_models, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAGRID_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """Exclude the objects of earlier test modules from garbage collection.

    Packs free their memory with a full collection. In a process that has imported Ray, MLflow and half of the tests,
    a full collection takes longer than a pack's training. Excluded garbage is collected when the next module starts.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of 300 tokens, with a chat template, trained on the rows of `chat_jsonl`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["prompt"] + row["completion"] for row in chat_rows()], trainer)
    wrapped: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|start|>", eos_token="<|end|>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: "PreTrainedTokenizerFast") -> Path:
    """A folder with a random Llama: hidden 32, 2 layers, 4 heads (2 for keys and values), context 128."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tiny_tokenizer.pad_token_id,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: "PreTrainedTokenizerFast") -> Path:
    """A folder with a random GPT-2 (its linear layers are `Conv1D`): hidden 32, 2 layers, 4 heads, context 128."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tiny_tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        pad_token_id=tiny_tokenizer.pad_token_id,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `.jsonl` file with 96 prompt/completion rows of at most 64 tokens."""
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_rows()), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shared_ray() -> "Iterator[SharedRay]":
    """The Ray that all tests of this process share; the first test that needs it starts it."""
    from tests.support.shared_ray import SharedRay

    shared = SharedRay()
    yield shared
    shared.stop()


@pytest.fixture(scope="module", autouse=True)
def no_ray_among_units(request: pytest.FixtureRequest, shared_ray: "SharedRay") -> None:
    """Stop the shared Ray before a file of unit tests, because its processes use CPU time."""
    tests = (item for item in request.session.items if item.path == request.node.path)
    if not any(item.get_closest_marker("end_to_end") for item in tests):
        shared_ray.stop()


@pytest.fixture(scope="module")
def ray_of_two_cpus(shared_ray: "SharedRay") -> str:
    """The address of the shared Ray, which is running; this process is its driver."""
    return shared_ray.start()


@pytest.fixture
def refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Refuses":
    """Runs a malformed experiment on the command line and checks the refusal."""
    from tests.support.refusals import make_refuses

    return make_refuses(tmp_path, monkeypatch, capsys)


@pytest.fixture
def valid_experiment(tiny_llama_dir: Path, chat_jsonl: Path, tmp_path: Path) -> dict[str, Any]:
    """The contents of a valid experiment file."""
    return {
        "name": "valid",
        "model": {"name": str(tiny_llama_dir), "dtype": "float32"},
        "data": {"name": str(chat_jsonl), "max_length": 96, "num_eval": 8},
        "training": {"steps": 3, "batch_size": 4},
        "methods": ["lora"],
        "storage": {"path": str(tmp_path / "store")},
    }


@pytest.fixture
def write(valid_experiment: dict[str, Any], tmp_path: Path) -> "Write":
    """Writes `valid_experiment` to a file, with one key changed."""
    from tests.support.refusals import changed

    def write_file(key: str, value: object) -> Path:
        file = tmp_path / "experiment.yaml"
        file.write_text(yaml.safe_dump(changed(valid_experiment, key, value)), encoding="utf-8")
        return file

    return write_file
