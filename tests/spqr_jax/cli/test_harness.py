"""Checkpoints on tasks of lm-eval, beside its own model for Hugging Face's; tasks and data are local files."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import pytest
import yaml
from helpers.byte_tokenizer import byte_tokenizer
from helpers.command_line import result, spqr
from helpers.tiny_models import random_tensors, tiny_config, write_checkpoint
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from spqr_jax import save
from spqr_jax.cli.harness import SpqrLM
from spqr_jax.cli.models import load_model

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "mix", "ink"]
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "fewshot_split": "test",
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\x17\\", "{{{"], "max_gen_toks": 40},
        "metric_list": [{"metric": "exact_match"}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def documents(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)

    def phrase(least: int, most: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(least, most)))

    # Of so many choices, one is the likeliest, and no batch has room for all.
    characters = {"question": phrase(2, 12), "choices": [chr(i) for i in range(1, 128)], "text": "fox"}
    return [characters | {"label": 7}] + [
        {
            "question": phrase(2, 12),
            "choices": [phrase(1, 6) for _ in range(rng.integers(2, 6))],
            "label": 1,
            "text": phrase(5, 150),
        }
        for _ in range(count)
    ]


def write_tasks(directory: Path) -> Path:
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents(6)))
    for name, content in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (directory / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **content}))
    return directory


@pytest.fixture(scope="module", autouse=True)
def _no_shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture
def _only_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command without lm-eval's own tasks, which take six seconds to find."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(vocab_size=257, eos_token_id=256)
    tensors = random_tensors(config)
    tensors["lm_head.weight"] *= 0.1
    directory = write_checkpoint(tmp_path_factory.mktemp("models") / "plain", config, tensors)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def packed(plain: Path) -> Path:
    result("quantize", plain, plain.parent / "packed", "--preset", "paper", "--method", "rtn")
    return plain.parent / "packed"


def evaluated(model: Any, tasks: Path, fewshot: int | None = None) -> dict[str, Any]:
    manager = TaskManager(include_path=tasks, include_defaults=False)
    return lm_eval.simple_evaluate(
        model, tasks=list(TASKS), num_fewshot=fewshot, task_manager=manager, bootstrap_iters=0
    )


def answers(found: dict[str, Any], task: str) -> list[Any]:
    return [sample["resps"] for sample in found["samples"][task]]


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for task, metrics in wanted["results"].items():
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        assert numbers
        assert {name: found["results"][task][name] for name in numbers} == pytest.approx(numbers, rel=1e-5)
    assert answers(found, "write") == answers(wanted, "write")
    ours, theirs = (choices(x) for x in (found, wanted))
    np.testing.assert_allclose([log for log, _ in ours], [log for log, _ in theirs], atol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    ours, theirs = (np.array(answers(x, "perplexity"), float).ravel() for x in (found, wanted))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-4)


def choices(found: dict[str, Any]) -> list[tuple[float, bool]]:
    return [choice for resps in answers(found, "choice") for (choice,) in resps]


@pytest.fixture(scope="module")
def found(plain: Path, tasks: Path) -> dict[str, Any]:
    return evaluated(SpqrLM(str(plain), batch_size=4), tasks)


@pytest.mark.slow
@pytest.mark.parametrize(("max_length", "fewshot"), [(None, None), (64, 2)])
def test_scores_are_those_of_the_model_for_hugging_face(
    plain: Path, tasks: Path, max_length: int | None, fewshot: int | None
) -> None:
    """With 64 tokens, contexts are cut and texts take several windows."""
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    theirs = evaluated(HFLM(str(plain), device="cpu", batch_size=4, max_length=max_length), tasks, fewshot)
    assert_same(evaluated(SpqrLM(str(plain), batch_size=4, max_length=max_length), tasks, fewshot), theirs)
    assert {greedy for _, greedy in choices(theirs)} == {True, False}
    written = [len(text) for ((text,),) in answers(theirs, "write")]
    assert min(written) < 20 < max(written), "the fixture is too easy: no text is ended, or all are"


def test_a_token_for_the_start_of_a_text_comes_once(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    config = tiny_config(vocab_size=258, eos_token_id=256)
    tokenizer.save_pretrained(write_checkpoint(tmp_path, config, random_tensors(config)))
    ours, theirs = SpqrLM(str(tmp_path)), HFLM(str(tmp_path), device="cpu")
    assert ours.prefix_token_id == theirs.prefix_token_id == start
    for text in ("fox", "<s>fox", "<end>fox", ""):
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special)
    assert ours.tok_encode("fox") == ours.tok_encode("<s>fox") == [start, *ours.tok_encode("fox", False)]


@pytest.mark.slow
def test_scores_do_not_depend_on_the_batch(plain: Path, tasks: Path, found: dict[str, Any]) -> None:
    assert_same(evaluated(SpqrLM(str(plain), batch_size=1), tasks), found)


@pytest.mark.slow
def test_a_packed_model_scores_as_its_dequantized_weights(packed: Path, tasks: Path, found: dict[str, Any]) -> None:
    dense = packed.parent / "dense"
    result("export", packed, dense, "--format", "hf", "--dtype", "float32")
    # All at once, because programs with packed matrices compile for long. Unpacked, they would be rounded to 16 bits.
    models = [SpqrLM(str(path), batch_size=128, memory="packed") for path in (packed, dense)]
    scored, wanted = (evaluated(model, tasks) for model in models)
    assert_same(scored, wanted)
    assert max(abs(a - b) for (a, _), (b, _) in zip(choices(scored), choices(found), strict=True)) > 0.1


def generated(model: SpqrLM, prompts: list[str], **options: Any) -> list[str]:
    return model.generate_until([Instance("generate_until", {}, (prompt, options), 0) for prompt in prompts])


@pytest.mark.slow
def test_sampling_differs_between_repeats(plain: Path) -> None:
    model = SpqrLM(str(plain), batch_size=2)
    sampled = generated(model, ["fox"] * 4, do_sample=True, temperature=1.0, max_gen_toks=20)
    assert len(set(sampled)) == 4
    assert len(set(generated(model, ["fox"] * 4, do_sample=True, temperature=1.0, top_k=1, max_gen_toks=20))) == 1


@pytest.mark.slow
def test_requests_of_other_options_and_lengths_keep_their_places(plain: Path) -> None:
    model = SpqrLM(str(plain), batch_size=2)
    prompts = [(word, {"max_gen_toks": count}) for word, count in [("a", 3), ("fox", 5), ("quick", 3), ("the lazy", 3)]]
    together = model.generate_until([Instance("generate_until", {}, arguments, 0) for arguments in prompts])
    assert together == [generated(model, [prompt], **options)[0] for prompt, options in prompts]


def test_no_requests(plain: Path) -> None:
    model = SpqrLM(str(plain))
    assert model.loglikelihood([]) == model.loglikelihood_rolling([]) == model.generate_until([]) == []


def test_chat_template(plain: Path) -> None:
    model = SpqrLM(str(plain))
    model.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert model.apply_chat_template([{"role": "user", "content": "fox"}]) == "<user>fox"


@pytest.mark.usefixtures("_only_own_tasks")
@pytest.mark.slow
def test_the_command_prints_what_lm_eval_finds(plain: Path, tasks: Path, found: dict[str, Any]) -> None:
    arguments = ("tasks", plain, "--tasks", "choice,perplexity", "--limit", 3, "--batch", 4, "--include-path", tasks)
    told = result(*arguments)
    assert told["n-samples"]["choice"] == {"original": 7, "effective": 3}
    metrics = told["results"]["choice"]
    wanted = [sample["acc"] for sample in found["samples"]["choice"][:3]]
    assert metrics["acc,none"] == pytest.approx(np.mean(wanted))
    done = spqr(*arguments)
    assert done.returncode == 0, done.stderr
    rows = {
        " ".join(cells[:-1]): cells[-1]
        for cells in (line.replace("│", "").split() for line in done.stdout.splitlines())
    }
    assert float(rows["choice acc"]) == pytest.approx(metrics["acc,none"], rel=1e-3)
    assert {"choice acc norm", "choice acc stderr", "perplexity byte perplexity", "seconds"} <= rows.keys()


@pytest.mark.usefixtures("_only_own_tasks")
def test_a_task_that_there_is_not(plain: Path, tasks: Path) -> None:
    done = spqr("tasks", plain, "--tasks", "choice,nonsense,other", "--include-path", tasks)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: lm-eval has no task nonsense, other: list its tasks with `lm-eval ls tasks`\n"


def test_without_lm_eval(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = spqr("tasks", plain)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert 'lm_eval is not installed: pip install "spqr-jax[lm-eval]"' in done.stderr


def test_errors_of_the_model(plain: Path, tmp_path: Path) -> None:
    bare, params, _ = load_model(str(plain), "float32")
    save(tmp_path / "bare", bare, params)
    with pytest.raises(ValueError, match="the checkpoint has no tokenizer"):
        SpqrLM(str(tmp_path / "bare"))
    for size in ("auto", 0):
        with pytest.raises(ValueError, match=f"batch_size is {size}, but must be a number of at least 1"):
            SpqrLM(str(plain), batch_size=size)
    with pytest.raises(ValueError, match=r"max_length is 300, .* at most the model's 256"):
        SpqrLM(str(plain), max_length=300)
    model = SpqrLM(str(plain), max_length=30)
    with pytest.raises(ValueError, match=r"40 new tokens .* max_length of 30"):
        generated(model, ["fox"], max_gen_toks=40)
    with pytest.raises(ValueError, match="asks for generation with num_beams"):
        generated(model, ["fox"], num_beams=3)
    with pytest.raises(ValueError, match="continuation of 31 tokens is too long for max_length 30"):
        model.loglikelihood([Instance("loglikelihood", {}, ("fox", "x" * 31), 0)])
    model.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no token for the start or the end of a text"):
        model.loglikelihood([Instance("loglikelihood", {}, ("", "fox"), 0)])


@pytest.mark.slow
def test_lm_evals_own_command(plain: Path, tasks: Path) -> None:
    arguments = ["--model", "spqr", "--model_args", f"pretrained={plain}", "--tasks", "choice", "--batch_size", "4"]
    command = [sys.executable, "-m", "spqr_jax.cli.harness", "run", *arguments, "--include_path", str(tasks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "acc_norm" in done.stdout
