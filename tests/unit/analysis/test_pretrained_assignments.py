"""The assignments of models of transformers equal what hooks on their experts count."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pretrained_models import OPTIONS, TEXT, write_model
from torch import Tensor, nn

from moebench.analysis.pretrained.collect import Collection, collect
from moebench.analysis.pretrained.recorder import read_choice, record_routers
from moebench.analysis.pretrained.windows import ProbeText, build_causal, build_encoder_decoder, cut_windows
from moebench.errors import UsageError
from moebench.pretrained.folder import open_pretrained
from moebench.pretrained.model import PretrainedModel, load_model
from moebench.pretrained.tokenizer import PretrainedTokenizer, read_tokenizer
from moebench.tasks.text.document import Document

CAUSAL = [model_type for model_type in OPTIONS if model_type != "switch_transformers"]
LENGTH, NUM_TOKENS = 24, 192
DOCUMENTS = [Document(text=TEXT * 12, domain=domain, group=domain) for domain in ("first", "second")]


def bias_selection(model: nn.Module) -> None:
    """Give DeepSeek-V3's routers a selection bias that changes most choices."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.4, 0.4, len(buffer)))


def read(folder: Path, model_type: str) -> tuple[PretrainedModel, PretrainedTokenizer, ProbeText]:
    write_model(folder, model_type, bias_selection)
    opened = open_pretrained(f"hf:{folder}")
    model, tokenizer = load_model(opened), read_tokenizer(opened)
    windows, domain_B, domains = cut_windows(DOCUMENTS, tokenizer, length=LENGTH, max_tokens=NUM_TOKENS)
    assert {len(window) for window in windows} == {LENGTH}  # no padding: every position counts
    if opened.family.is_encoder_decoder:
        main, decoder = build_encoder_decoder(windows, tokenizer, start_id=0)
    else:
        main, decoder = build_causal(windows, tokenizer), None
    return model, tokenizer, ProbeText(main=main, decoder=decoder, domain_B=torch.tensor(domain_B), domains=domains)


def probe(model: PretrainedModel, tokenizer: PretrainedTokenizer, text: ProbeText, batch_size: int = 3) -> Collection:
    byte_count_V = torch.tensor([len(piece) for piece in tokenizer.pieces])
    return collect(model, text, byte_count_V, batch_size=batch_size)


def tabulate(expert_NK: Tensor, label_N: Tensor, num_experts: int) -> np.ndarray:
    """Count labels and experts one assignment at a time."""
    table = np.zeros((int(label_N.max()) + 1, num_experts), dtype=np.int64)
    for label, experts in zip(label_N.tolist(), expert_NK.tolist(), strict=True):
        for expert in experts:
            table[label, expert] += 1
    return table


@pytest.mark.parametrize("model_type", CAUSAL)
def test_tables_equal_those_of_hooks_on_the_dispatch(tmp_path: Path, model_type: str) -> None:
    model, tokenizer, text = read(tmp_path, model_type)
    domain_of_row_T = text.domain_B.repeat_interleave(LENGTH)
    tables: dict[str, np.ndarray] = {}
    hooks = []
    for name, module in model.module.named_modules():
        if type(module).__name__.endswith("Experts"):
            layer = name.split(".")[2]
            table = tables[layer] = np.zeros((2, 8), dtype=np.int64)

            def count(_: nn.Module, arguments: tuple[Any, ...], table: np.ndarray = table) -> None:
                for domain, experts in zip(domain_of_row_T.tolist(), arguments[1].tolist(), strict=True):
                    for expert in experts:
                        table[domain, expert] += 1

            hooks.append(module.register_forward_pre_hook(count))
    with torch.no_grad():
        model.module(input_ids=text.main.token_BL, use_cache=False)
    for hook in hooks:
        hook.remove()
    collection = probe(model, tokenizer, text)
    domain_N = collection.select_tokens(None).domain_N
    assert len(domain_N) == NUM_TOKENS
    assert [str(layer.name) for layer in collection.layers] == list(tables)
    for layer in collection.layers:
        counted = tabulate(layer.expert_NK, domain_N, layer.num_experts)
        assert counted.sum() == NUM_TOKENS * 2
        np.testing.assert_array_equal(counted, tables[str(layer.name)])


@pytest.mark.parametrize("model_type", CAUSAL)
def test_loads_equal_the_rows_that_each_expert_computes(tmp_path: Path, model_type: str) -> None:
    """The plain loop of the library calls the activation once for every expert with tokens, in ascending order."""
    model, tokenizer, text = read(tmp_path, model_type)
    model.module.config._experts_implementation = "eager"
    rows: dict[str, list[int]] = {}
    hooks = []
    for name, module in model.module.named_modules():
        if type(module).__name__.endswith("Experts"):
            counts = rows[name.split(".")[2]] = []

            def count(_: nn.Module, arguments: tuple[Any, ...], counts: list[int] = counts) -> None:
                counts.append(len(arguments[0]))

            hooks.append(module.act_fn.register_forward_pre_hook(count))
    collection = probe(model, tokenizer, text, batch_size=100)
    for hook in hooks:
        hook.remove()
    for layer in collection.layers:
        load_E = tabulate(layer.expert_NK, torch.zeros(NUM_TOKENS, dtype=torch.int64), layer.num_experts)[0]
        assert rows[str(layer.name)] == load_E[load_E > 0].tolist()


def test_loads_of_switch_equal_the_rows_of_its_expert_modules(tmp_path: Path) -> None:
    """Tokens beyond the capacity of 4 for each sequence reach no expert, in the encoder and in the decoder."""
    model, tokenizer, text = read(tmp_path, "switch_transformers")
    assert text.decoder is not None
    text = ProbeText(  # the start of the decoder is no text; here all positions count, as they do in the hooks
        main=text.main,
        decoder=type(text.decoder)(**{**vars(text.decoder), "is_text_BL": text.decoder.is_valid_BL}),
        domain_B=text.domain_B,
        domains=text.domains,
    )
    rows: Counter[str] = Counter()
    hooks = []
    for name, module in model.module.named_modules():
        if name.split(".")[-1].startswith("expert_"):
            half, _, block, *_, expert = name.split(".")

            def count(_: nn.Module, arguments: tuple[Any, ...], key: str = f"{half}.{block} {expert}") -> None:
                rows[key] += len(arguments[0])

            hooks.append(module.register_forward_pre_hook(count))
    collection = probe(model, tokenizer, text)
    for hook in hooks:
        hook.remove()
    loads = {
        f"{layer.name} expert_{expert}": int(((layer.expert_NK == expert) & layer.is_kept_NK).sum())
        for layer in collection.layers
        for expert in range(layer.num_experts)
    }
    assert {key: load for key, load in loads.items() if load} == dict(rows)
    assert any(not bool(layer.is_kept_NK.all()) for layer in collection.layers)
    for layer in collection.layers:  # kept: the first 4 of a sequence that chose an expert
        half = collection.select_tokens(layer.name.half)
        seen: Counter[tuple[int, int]] = Counter()
        for sequence, expert, is_kept in zip(
            half.sequence_N.tolist(), layer.expert_NK[:, 0].tolist(), layer.is_kept_NK[:, 0].tolist(), strict=True
        ):
            seen[sequence, expert] += 1
            assert is_kept == (seen[sequence, expert] <= 4)


@pytest.mark.parametrize("model_type", OPTIONS)
def test_recorded_logits_are_those_that_the_library_returns(tmp_path: Path, model_type: str) -> None:
    model, _, text = read(tmp_path, model_type)
    inputs = {"input_ids": text.main.token_BL, "use_cache": False, "output_router_logits": True}
    if text.decoder is not None:
        inputs["decoder_input_ids"] = text.decoder.token_BL
    with torch.no_grad(), record_routers(model.routers) as records:
        output = model.module.model(**inputs) if text.decoder is None else model.module(**inputs)
    if text.decoder is None:
        returned = output.router_logits
    else:
        returned = [logits.flatten(0, 1) for logits in (*output.encoder_router_logits, *output.decoder_router_logits)]
    assert len(returned) == len(records)
    for logits_TE, record in zip(returned, records.values(), strict=True):
        [choice] = record.choices
        assert torch.equal(logits_TE.float(), choice.logits_TE)


def test_the_choice_of_deepseek_v3_has_its_bias_and_its_groups(tmp_path: Path) -> None:
    """By hand: sigmoid plus bias, the 2 of 4 groups with the largest sums, then the 2 best experts in these."""
    model, _, text = read(tmp_path, "deepseek_v3")
    with torch.no_grad(), record_routers(model.routers) as records:
        model.module.model(input_ids=text.main.token_BL, use_cache=False)
    num_unlike_logits = 0
    for layer, record in records.items():
        [choice] = record.choices
        bias_E = model.routers[layer].e_score_correction_bias.tolist()
        for experts, logits in zip(choice.expert_TK.tolist(), choice.logits_TE.double().tolist(), strict=True):
            scores = [1 / (1 + np.exp(-logit)) + bias for logit, bias in zip(logits, bias_E, strict=True)]
            groups = sorted(range(4), key=lambda group: -(scores[2 * group] + scores[2 * group + 1]))[:2]
            allowed = [expert for expert in range(8) if expert // 2 in groups]
            assert set(experts) == set(sorted(allowed, key=lambda expert: -scores[expert])[:2])
            num_unlike_logits += set(experts) != set(np.argsort(logits)[-2:])
    assert num_unlike_logits > 50  # of 384: the choice is not the largest logits


def test_padding_and_special_tokens_do_not_count(tmp_path: Path) -> None:
    model, tokenizer, _ = read(tmp_path, "olmoe")
    tokenizer = PretrainedTokenizer(text=tokenizer.text, prefix=(0,), suffix=(0,), sentinels=(), tokens=())
    short = [Document(text=TEXT, domain="one", group="0"), Document(text=TEXT[:30], domain="two", group="1")]
    windows, domain_B, domains = cut_windows(short, tokenizer, length=40, max_tokens=1000)
    batch = build_causal(windows, tokenizer)
    text = ProbeText(main=batch, decoder=None, domain_B=torch.tensor(domain_B), domains=domains)
    assert not bool(batch.is_valid_BL.all())
    together, alone = (
        probe(model, tokenizer, text, batch_size=len(windows)),
        probe(model, tokenizer, text, batch_size=1),
    )
    counted = together.select_tokens(None)
    assert len(counted) == sum(map(len, windows))
    assert counted.token_N.tolist() == [token for window in windows for token in window.tolist()]
    assert counted.previous_N[0] == 0  # the special token at the beginning
    assert counted.next_N[: len(windows[0]) - 1].tolist() == windows[0][1:].tolist()
    for layer, layer_alone in zip(together.layers, alone.layers, strict=True):
        assert torch.equal(layer.expert_NK.sort(1).values, layer_alone.expert_NK.sort(1).values)
    assert together.nats == pytest.approx(alone.nats, rel=1e-5)


def test_the_quality_is_that_of_the_library(tmp_path: Path) -> None:
    model, tokenizer, text = read(tmp_path, "mixtral")
    with torch.no_grad():
        loss = model.module(input_ids=text.main.token_BL, labels=text.main.token_BL, use_cache=False).loss
    collection = probe(model, tokenizer, text)
    assert collection.nats == pytest.approx(float(loss), rel=1e-5)
    num_bytes = sum(len(tokenizer.pieces[token]) for token in text.main.token_BL[:, 1:].flatten().tolist())
    num_predicted = text.main.token_BL[:, 1:].numel()
    assert collection.bits_per_byte == pytest.approx(float(loss) * num_predicted / np.log(2) / num_bytes, rel=1e-5)


def test_randomised_routers_leave_the_model_as_it_is(tmp_path: Path) -> None:
    """The control has the same inputs, other choices, logits of the same scale, and changes no weight."""
    model, tokenizer, text = read(tmp_path, "deepseek_v3")
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    first, second = probe(model, tokenizer, text), probe(model, tokenizer, text)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    for layer, again in zip(first.layers, second.layers, strict=True):
        assert torch.equal(layer.random_NK, again.random_NK)
        assert not torch.equal(layer.random_NK, layer.expert_NK)
        assert layer.random_NK.unique().tolist() == list(range(8))


def test_an_unknown_form_of_output_is_refused() -> None:
    router = nn.Identity()
    for output in (
        torch.ones(2, 8),
        (torch.ones(2, 8),) * 3,
        (torch.ones(2, 8), torch.ones(2, 2), torch.full((2, 2), 9)),
    ):
        with pytest.raises(UsageError, match=r"Identity returns another form than in version 5\.24"):
            read_choice(router, output)
