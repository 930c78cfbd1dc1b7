"""A model that a trial leaves: what is read again is what was trained, and nothing else is taken for it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import sparsemem
from sparsemem.budget import solve
from sparsemem.config import ConfigError, Trial
from sparsemem.data import Tokens, validation_windows
from sparsemem.model import Transformer
from sparsemem.train import checkpoint, kept, loop, run_trial
from sparsemem.train.evaluate import sequence_losses
from sparsemem.train.kept import CANONICAL, KeptModel, keep_model, load_model
from sparsemem.trial_files import CONFIG, MODEL, MODEL_FILES, TOKENIZER

from .conftest import CONTEXT, SEPARATOR

Make = Callable[..., Trial]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "prepare_process", lambda threads: torch.set_num_threads(threads))


@pytest.fixture(scope="session")
def tokens(tokens_folder: Path) -> Path:
    """The corpus with a byte-level tokenizer of its separator and single bytes."""
    entries = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(entries)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(entries[SEPARATOR], special=True)])
    tokenizer.save(str(tokens_folder / "tokenizer.json"))
    return tokens_folder


def held_out_loss(model: KeptModel, tokens: Path) -> float:
    val = Tokens.load(tokens).val
    windows = validation_windows(val, CONTEXT, (len(val) - 1) // CONTEXT)
    return float(sequence_losses(model.model, *windows, model.precision).mean())


def trained(trial: Trial, tokens: Path, folder: Path) -> dict[str, Any]:
    return run_trial(trial, tokens, folder, threads=1, device="cpu", keep=True)


@pytest.fixture(scope="module")
def one(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trial with experts and Engram, half each; not to be written to."""
    from .conftest import BASE

    folder = tmp_path_factory.mktemp("kept") / "trial"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare_process", lambda threads: torch.set_num_threads(threads))
        trained(Trial.model_validate(BASE | {"rho": 0.5, "seed": 0}), tokens, folder)
    return folder


@pytest.fixture
def copy(one: Path, tmp_path: Path) -> Path:
    """Its three files alone."""
    (tmp_path / "copy").mkdir()
    for name in MODEL_FILES:
        shutil.copyfile(one / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def test_a_copy_of_the_three_files_gives_the_trials_held_out_loss(one: Path, copy: Path, tokens: Path) -> None:
    model = sparsemem.load_model(copy)
    result = json.loads((one / "result.json").read_text())
    assert held_out_loss(model, tokens) == result["val_loss"] == model.val_loss
    assert model.trial.id == result["trial_id"]
    assert model.tokenizer.encode("a").ids[0] != model.separator_id == SEPARATOR
    assert not model.model.training


def test_every_memory_is_read_again(memory_trial: Trial, tokens: Path, tmp_path: Path) -> None:
    result = trained(memory_trial, tokens, tmp_path)
    assert held_out_loss(load_model(tmp_path), tokens) == result["val_loss"]
    header = struct.unpack("<Q", (tmp_path / MODEL).read_bytes()[:8])[0]
    parameters = sum(weight.numel() for weight in load_model(tmp_path).model.parameters())
    numbers = (tmp_path / MODEL).stat().st_size - 8 - header - 8 * memory_trial.data.vocab_size
    assert numbers == pytest.approx(4 * parameters, rel=0.01)  # buffers, such as a router's bias, are few


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_written_once(make_trial: Make, tokens: Path, tmp_path: Path, tied: bool) -> None:
    trial = make_trial("dense", model={"tie_embeddings": tied}, train={"precision": "bf16"})
    result = trained(trial, tokens, tmp_path)
    model = load_model(tmp_path)
    assert model.precision == torch.bfloat16
    assert held_out_loss(model, tokens) == result["val_loss"]
    with safe_open(tmp_path / MODEL, framework="pt") as file:
        assert ("head" in file.keys()) != tied  # noqa: SIM118


def test_one_tensor_under_two_names_is_written_once(
    make_trial: Make, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some mechanism may share a table between layers; here a second name is given to the embedding."""
    build = Transformer.__init__

    def twice(self: Transformer, *arguments: Any, **named: Any) -> None:
        build(self, *arguments, **named)
        self.second = self.embedding

    monkeypatch.setattr(Transformer, "__init__", twice)
    trained(make_trial("dense"), tokens, tmp_path)
    model = load_model(tmp_path).model
    assert model.second is model.embedding
    with safe_open(tmp_path / MODEL, framework="pt") as file:
        assert "embedding" in file.keys()  # noqa: SIM118
        assert "second" not in file.keys()  # noqa: SIM118


def test_the_library_reads_what_is_written(one: Path) -> None:
    with safe_open(one / MODEL, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = load_model(one).model.state_dict()
    assert weights.keys() - state.keys() == {CANONICAL}
    assert all(torch.equal(weights[name], state[name]) for name in state)
    assert not any("moment" in name or "optim" in name for name in weights)


def test_large_tables_are_written_in_pieces(
    one: Path, copy: Path, make_trial: Make, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_model(one)
    monkeypatch.setattr(kept, "PIECE", 7)
    trial, corpus = make_trial(), Tokens.load(tokens)
    sizes = solve(trial.model, trial.budget, trial.shares)
    vocabulary = torch.from_numpy(corpus.canonical), SEPARATOR
    tokenizer = (one / TOKENIZER).read_bytes()
    facts = torch.float32, corpus.digest, whole.val_loss
    keep_model(copy, whole.model, trial, sizes, tokenizer, *vocabulary, *facts)
    assert (copy / MODEL).read_bytes() == (one / MODEL).read_bytes()


# --- bad luck ---------------------------------------------------------------------------------------------------------


def test_a_kill_while_it_is_written_leaves_no_model_and_the_next_run_one(
    make_trial: Make, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*arguments: Any) -> None:
        arguments[0].write(b"half of it")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(kept, "_write", killed)
        patch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
        patch.setattr(loop, "CHECKPOINT_TIMES", 0)
        with pytest.raises(Killed):
            trained(make_trial(), tokens, tmp_path)
    assert not (tmp_path / MODEL).exists()
    assert not (tmp_path / "result.json").exists()
    assert (tmp_path / checkpoint.LAST).exists()
    with pytest.raises(ConfigError, match="holds no kept model"):
        load_model(tmp_path)
    result = trained(make_trial(), tokens, tmp_path)
    assert held_out_loss(load_model(tmp_path), tokens) == result["val_loss"]


def test_nothing_is_kept_unasked_or_of_a_diverged_trial(
    make_trial: Make, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_trial(make_trial(), tokens, tmp_path / "unasked", threads=1, device="cpu")
    monkeypatch.setattr(loop, "why_diverged", lambda *arguments: "it is worse than chance")
    assert trained(make_trial(), tokens, tmp_path / "diverged")["status"] == "diverged"
    assert not list(tmp_path.rglob("*.safetensors"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flipped(path: Path) -> None:
    """A bit of the last byte: in the file of weights it is one of a weight."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def removed(path: Path) -> None:
    path.unlink()


def text_of_another_kind(path: Path) -> None:
    path.write_text('{"model_type": "another"}\n')


@pytest.mark.parametrize("damage", [cut, lengthened, flipped, emptied, removed, text_of_another_kind])
@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_damaged_file_is_refused_by_its_name(copy: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(copy / name)
    with pytest.raises(ConfigError) as refused:
        load_model(copy)
    assert name in str(refused.value)
    assert str(copy) in str(refused.value)
    assert "run.keep_models" in str(refused.value) or "keep_models: true" in str(refused.value)


def test_no_flipped_byte_of_a_header_goes_unseen(copy: Path) -> None:
    path = copy / MODEL
    whole = path.read_bytes()
    weights = load_model(copy).model.state_dict()
    for place in range(0, 8 + struct.unpack("<Q", whole[:8])[0], 41):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            again = load_model(copy).model.state_dict()
        except ConfigError:
            continue
        assert all(torch.equal(weights[name], again[name]) for name in weights)  # a space between two words


def test_the_weights_of_another_trial_are_refused(copy: Path, make_trial: Make, tokens: Path, tmp_path: Path) -> None:
    trained(make_trial(seed=1), tokens, tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / MODEL, copy / MODEL)
    with pytest.raises(ConfigError, match=r"config\.json: is damaged, or another model's than .*keep_models"):
        load_model(copy)


def test_a_foreign_model_is_refused(copy: Path) -> None:
    save_file({"embedding": torch.zeros(4, 4)}, copy / MODEL, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.safetensors: is not a model that this version of sparsemem kept"):
        load_model(copy)


def test_a_pickle_is_not_run(copy: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    for name in MODEL_FILES:
        (copy / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(ConfigError):
            load_model(copy)
    assert not (tmp_path / "ran").exists()


def _restated(copy: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the config and make its checksum fit, as another version could have written it."""
    named = json.loads((copy / CONFIG).read_text())
    change(named)
    (copy / CONFIG).write_text(json.dumps(named))
    with safe_open(copy / MODEL, framework="pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    about["config"] = kept._sha256((copy / CONFIG).read_bytes())
    save_file(tensors, copy / MODEL, about)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda named: named["sizes"].update(shared_width=9), "its tensor `blocks"),
        (lambda named: named["sizes"].update(routed_experts=10**9), "its tensor `blocks"),
        (lambda named: named["sizes"]["tables"].update(engram=[[10**12 + 39] * 4]), r"its tensor `.*table\.rows_RC`"),
        (lambda named: named["sizes"].update(shared_width=10**30), r"config\.json: does not describe a kept model"),
        (lambda named: named["trial"]["model"].update(width=32), "its tensor `blocks"),
        (lambda named: named["trial"]["model"].update(widths=32), r"unknown field `model\.widths`"),
        (lambda named: named.pop("sizes"), r"config\.json: does not describe a kept model"),
        (lambda named: named.update(sizes=3), r"config\.json: does not describe a kept model"),
        (lambda named: named["trial"]["data"].update(vocab_size=4096), "lacks the canonical tokens"),
    ],
)
def test_a_model_of_other_sizes_is_refused_before_memory_is_taken(
    copy: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    _restated(copy, change)
    with pytest.raises(ConfigError, match=said) as refused:
        load_model(copy)
    assert str(copy) in str(refused.value)


@pytest.fixture
def study_folder(one: Path, tmp_path: Path) -> Path:
    for name in ("a", "b"):
        shutil.copytree(one, tmp_path / "study" / "trials" / name)
    return tmp_path / "study"


def test_a_folder_without_a_model_says_where_there_is_one(study_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no kept model .*; 2 of its trials have one: give .*trials/a or"):
        load_model(study_folder)
    with pytest.raises(ConfigError, match=r"no such folder; give that of a trial"):
        load_model(study_folder / "nowhere")
    shutil.rmtree(study_folder / "trials")
    with pytest.raises(ConfigError, match=r"holds no kept model .* `run: \{keep_models: true\}` before it is trained"):
        load_model(study_folder)
