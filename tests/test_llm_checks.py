"""llm.data.checks: lengths that the model has, and data sets that keep their rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from _text import make_tokenizer

from llm.data.checks import LEAKED, check_max_length, check_shares, with_leaks_noted
from llm.data.encode import Encoded, encode_sft
from llm.data.errors import DataError

TOKENIZER = make_tokenizer()


def sft(rows: list[dict[str, Any]], max_length: int = 200) -> Encoded:
    return encode_sft(rows, TOKENIZER, max_length=max_length, name="sft_data")


# --- maximum length


@pytest.mark.parametrize(
    ("asked", "positions", "tokenizer_limit", "expected"),
    [
        (None, 512, 10**30, 512),
        (None, 4096, 10**30, 1024),
        (None, None, 10**30, 1024),
        (None, None, 256, 256),
        (512, 512, 128, 512),
        (5000, None, 10**30, 5000),
    ],
)
def test_max_length(
    asked: int | None, positions: int | None, tokenizer_limit: int, expected: int
) -> None:
    assert check_max_length(asked, *limits(positions, tokenizer_limit)) == expected


def limits(positions: int | None, tokenizer_limit: int) -> Any:
    text_config = SimpleNamespace(max_position_embeddings=positions)
    config = SimpleNamespace(get_text_config=lambda: text_config)
    return config, SimpleNamespace(model_max_length=tokenizer_limit)


def test_max_length_of_a_real_config() -> None:
    from transformers import GPT2Config, GPTNeoXConfig

    assert check_max_length(None, GPTNeoXConfig(max_position_embeddings=77), TOKENIZER) == 77
    assert check_max_length(None, GPT2Config(n_positions=55), TOKENIZER) == 55


@pytest.mark.parametrize("asked", [513, 1, 0, -5])
def test_a_length_outside_the_positions_is_refused(asked: int) -> None:
    with pytest.raises(DataError, match=f"max_length is {asked}"):
        check_max_length(asked, *limits(512, 10**30))


# --- shares of the rows


def shares(encoded: Encoded, **limits: float) -> None:
    accepting = {"max_dropped": 1.0, "max_truncated": 1.0, "max_leaked": 1.0}
    check_shares(encoded, **(accepting | limits))


def test_a_share_beyond_its_limit_is_refused_by_name_with_the_reasons() -> None:
    rows = [
        {"prompt": "p", "completion": "c"},
        {"prompt": "p" * 50, "completion": "c"},
        {"prompt": "", "completion": "c"},
        {"prompt": "p", "completion": None},
    ]
    encoded = sft(rows, max_length=20)
    shares(encoded)  # 2 of 4 dropped, 1 of the 2 others truncated
    shares(encoded, max_dropped=0.5, max_truncated=0.5)
    with pytest.raises(DataError, match=r"2 of 4 dropped .* --max_dropped_share 0\.49") as error:
        shares(encoded, max_dropped=0.49)
    assert "sft_data: 2 of 4 rows kept" in str(error.value)
    assert "1 dropped (empty prompt: " in str(error.value)
    assert "1 dropped (not text: " in str(error.value)
    with pytest.raises(DataError, match=r"1 of 2 truncated .* --max_truncated_share 0\.4"):
        shares(encoded, max_truncated=0.4)
    with pytest.raises(DataError, match="--max_dropped_share 0"):
        shares(encoded, max_dropped=0.0)


def test_held_out_rows_that_are_trained_on_are_counted() -> None:
    train = sft([{"prompt": f"p{i}", "completion": " c"} for i in range(4)])
    other = [{"prompt": f"p{i}", "completion": " d"} for i in range(4)]
    leaking = sft(
        [*other, {"prompt": "p2", "completion": " c"}, {"prompt": "p", "completion": "c"}]
    )
    assert with_leaks_noted(sft(other), train).report.notes == {}
    noted = with_leaks_noted(leaking, train)
    assert noted.report.notes == {LEAKED: 1}
    assert noted.rows == leaking.rows
    shares(noted, max_leaked=0.2)
    with pytest.raises(DataError, match=r"1 of 6 leaked .* --max_leaked_share 0\.1"):
        shares(noted, max_leaked=0.1)
