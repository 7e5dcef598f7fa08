"""What a step computes once, takes from an engine's metadata, and reads on the host."""

import traceback
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tiny_networks import CONFIG, random_model

from dsv4_ascend.model import batch as batch_module
from dsv4_ascend.model.batch import build_batch
from dsv4_ascend.model.cache import PagedCache
from dsv4_ascend.model.paged import LayerCache, Paged
from dsv4_ascend.model.step import make_step
from dsv4_backend import dispatch, ragged
from dsv4_backend.errors import ArgumentError


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture
def computed(monkeypatch):
    """How often each function of `ragged` was called to make a step's indices."""
    calls = Counter()

    def counted(name):
        def call(*arguments):
            calls[name] += 1
            return getattr(ragged, name)(*arguments)

        return call

    names = ("slots", "closed_blocks", "token_sequences", "token_positions")
    monkeypatch.setattr(batch_module, "ragged", SimpleNamespace(**{n: counted(n) for n in names}))
    return calls


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def part(table, rows=2, width=3):
    return Paged(torch.zeros(20, rows, width), torch.tensor(table, dtype=torch.int32))


def step_of(model, lengths, block_size=3):
    room = {"max_sequences": 3, "max_tokens": 60, "max_step_tokens": 50}
    cache = model.new_cache(**room, block_size=block_size)
    ids = [[(7 * i + n) % 97 for i in range(n)] for n in lengths]
    return make_step(cache, [cache.new_sequence() for _ in lengths], ids)


def run(model, step):
    with torch.inference_mode():
        return model.network.run_layers(*step)


@pytest.mark.parametrize("layers", [1, 3])
def test_indices_are_computed_once_per_step_whatever_the_number_of_layers(computed, layers):
    kinds, ratios = ("swa", "csa", "hca") * layers, (0, 4, 16) * layers
    config = CONFIG.without_mtp()
    deep = type(config)(
        **{
            **vars(config),
            "num_hidden_layers": 3 * layers,
            "layer_kinds": kinds,
            "compress_ratios": ratios,
        }
    )
    run(random_model(deep), step_of(random_model(deep), [30, 7]))
    # The window, and entries of two ratios; index keys have the table and the rows of entries.
    assert computed == {"slots": 3, "closed_blocks": 2, "token_sequences": 1, "token_positions": 1}


def test_equal_memory_and_rows_share_slots():
    batch = build_batch(ints(*range(5)), ints(0, 5), ints(9))
    first = part([[4, 3, 2, 1, 0]])
    again = Paged(torch.ones(20, 2, 7), first.table[:])
    assert batch.token_slots(first) is batch.token_slots(again)
    assert batch.entry_slots(first, 4) is batch.entry_slots(again, 4)
    assert batch.entry_slots(first, 4) is not batch.entry_slots(first, 2)


@pytest.mark.parametrize(
    "other",
    [
        part([[4, 3, 2, 1, 0]], rows=3),
        part([[4, 3, 1, 2, 0]]),
        part([[0, 1, 2, 3, 4]]),
        Paged(torch.zeros(9, 5, 3), ints(*range(10, 0, -1)).view(1, 10)[:, ::2]),
    ],
)
def test_other_tables_or_rows_have_slots_of_their_own(other):
    batch, first = build_batch(ints(*range(5)), ints(0, 5), ints(9)), part([[4, 3, 2, 1, 0]])
    positions = torch.arange(4, 9)
    expected = ragged.slots(other.table, torch.zeros_like(positions), positions, other.block_size)
    assert not torch.equal(batch.token_slots(first), expected)
    assert torch.equal(batch.token_slots(other), expected)


def test_strides_tell_tables_at_one_address_apart():
    batch, wide = build_batch(ints(*range(5)), ints(0, 5), ints(5)), part([[6, 5, 4, 3, 2, 1]])
    left, even = (Paged(wide.tensor, t) for t in (wide.table[:, :3], wide.table[:, ::2]))
    assert batch.token_slots(left).tolist() == [12, 13, 10, 11, 8]
    assert batch.token_slots(even).tolist() == [12, 13, 8, 9, 4]


def test_tables_that_come_and_go_are_not_taken_for_each_other():
    """A freed table's address may be the next one's."""
    batch = build_batch(ints(1), ints(0, 1), ints(1))
    for block in range(50):
        assert batch.token_slots(part([[block % 20]])).item() == 2 * (block % 20)


def test_slots_are_written_and_nothing_else():
    batch = build_batch(ints(*range(3)), ints(0, 2, 3), ints(5, 1))
    ring = part([[7, 9], [3, -1]])
    ring.write(torch.arange(1.0, 4.0).expand(3, 3).T.contiguous(), batch.token_slots(ring))
    want = torch.zeros(20, 2, 3)
    want[9, 1], want[7, 0], want[3, 0] = 1, 2, 3
    assert torch.equal(ring.tensor, want)
    assert ring.read() == (ring.tensor, ring.table)


@pytest.mark.parametrize("behind", [1, 5])
@pytest.mark.parametrize("empty", [0, 1, 3])
def test_padding_changes_nothing_and_gives_zeros(model, behind, empty):
    plain, padded = step_of(model, [9, 20]), step_of(model, [9, 20])
    lengths, starts = padded.batch.seq_lens, padded.batch.query_start_loc
    batch = build_batch(
        torch.cat([padded.batch.input_ids, torch.full((behind,), 10**6)]),
        torch.cat([starts, starts[-1:].repeat(empty)]),
        torch.cat([lengths, ints(*range(empty))]),
    )

    def longer(p):
        garbage = p and torch.full((empty, p.table.shape[1]), 99, dtype=torch.int32)
        return p and Paged(p.tensor, torch.cat([p.table, garbage]))

    parts = [{name: longer(p) for name, p in vars(layer).items()} for layer in padded.layers]
    layers = [LayerCache(**by_name) for by_name in parts]
    want, got = run(model, plain), run(model, (batch, layers))
    assert got.shape == (29 + behind, *want.shape[1:])
    torch.testing.assert_close(got[:29], want, rtol=1e-5, atol=1e-5)
    assert not got[29:].any()
    next_ids = torch.ones(29 + behind, dtype=torch.int64)
    with torch.inference_mode():
        drafted = model.network.run_mtp(0, next_ids, got, batch, layers)
        wanted = model.network.run_mtp(0, next_ids[:29], want, *plain)
    torch.testing.assert_close(drafted[:29], wanted, rtol=1e-5, atol=1e-5)
    assert not drafted[29:].any()


@pytest.mark.parametrize("sequences", [0, 1, 3])
def test_a_step_without_tokens_gives_zeros(model, sequences):
    layers = step_of(model, [0] * sequences).layers
    lengths = torch.zeros(sequences, dtype=torch.int32)
    starts = torch.zeros(sequences + 1, dtype=torch.int32)
    batch = build_batch(torch.full((4,), -1), starts, lengths)
    got = run(model, (batch, layers))
    assert got.shape == (4, CONFIG.hc_mult, CONFIG.hidden_size)
    assert not got.any()


def test_mtp_blocks_run_with_their_caches_alone(model):
    one, two = step_of(model, [9]), step_of(model, [9])
    streams, ids = run(model, one), torch.arange(9)
    with torch.inference_mode():
        want = model.network.run_mtp(0, ids, streams, *one)
        got = model.network.run_mtp(0, ids, streams, two.batch, two.layers[-1:])
    assert torch.equal(got, want)


COLUMNS = {0: 1, 3: 1, 11: 1, 12: 2, 39: 5, 40: 5, 48: 6, 999: 7}


@pytest.mark.parametrize(("bound", "columns"), COLUMNS.items())
def test_tables_of_entries_are_read_up_to_the_longest_sequence(bound, columns):
    batch = build_batch(ints(1), ints(0, 1), ints(1), max_seq_len=bound)
    entries = part([[9] * 7, [8] * 7])
    reached = batch.reachable(entries, 4)
    assert torch.equal(reached.table, entries.table[:, :columns])
    assert reached.tensor is entries.tensor
    again = batch.reachable(Paged(torch.zeros(3, 2, 1), entries.table), 4)
    assert again.table is reached.table


@pytest.mark.parametrize(
    ("metadata", "tokens", "words"),
    [
        (
            (ints(1, 2), ints(0, 2), ints(2, 2)),
            None,
            r"query_start_loc: found shape \(2,\), expected shape \(3,\)",
        ),
        (
            (ints(1, 2), ints(0, 1, 2), ints(2)),
            None,
            r"query_start_loc: found shape \(3,\), expected shape \(2,\)",
        ),
        ((ints(1, 2), ints(0, 2).view(1, 2), ints(2)), None, "query_start_loc: found shape"),
        (
            (ints(1, 2), ints(0, 3), ints(3)),
            None,
            "num_actual_tokens: found 3, expected 0 to 2, the rows of input_ids",
        ),
        ((ints(1, 2), ints(0, 2), ints(3)), 4, "num_actual_tokens: found 4, expected 0 to 2"),
        ((ints(1, 2), ints(0, 2), ints(3)), -1, "num_actual_tokens: found -1"),
    ],
)
def test_metadata_that_does_not_fit_is_named(metadata, tokens, words):
    with pytest.raises(ArgumentError, match=words):
        build_batch(*metadata, num_actual_tokens=tokens)


READS = (
    "tolist",
    "item",
    "__bool__",
    "__int__",
    "__index__",
    "__float__",
    "nonzero",
    "unique",
    "cpu",
    "numpy",
)


@pytest.fixture
def readers(monkeypatch):
    """Files of the project in which a step asks the host for a value of a tensor."""
    found = Counter()

    def watched(original):
        def read(tensor, *arguments, **options):
            files = [f.filename for f in traceback.extract_stack() if "dsv4_" in f.filename]
            found[files[-1].rpartition("/")[2]] += 1
            return original(tensor, *arguments, **options)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
    return found


def test_an_unchecked_step_reads_no_value_on_the_host(model, readers):
    step = step_of(model, [30, 7])
    readers.clear()
    with dispatch.use(check_contents=False):
        run(model, build_again(step))
    assert not readers
    # Nor do checks in Python: they are the relations of contracts, which C++ reads.
    run(model, step)
    assert not readers
    # References of grouped products slice rows by offsets: what is looked for is seen.
    with dispatch.use("reference", check_contents=False):
        run(model, step)
    assert set(readers) == {"experts.py"}


def build_again(step):
    batch = step.batch
    metadata = batch.input_ids, batch.query_start_loc, batch.seq_lens
    again = build_batch(*metadata, num_actual_tokens=len(batch.input_ids), max_seq_len=37)
    return again, step.layers


def test_our_own_cache_gives_every_layer_of_a_group_one_table(model):
    layers = step_of(model, [5]).layers
    assert len({id(layer.window.table) for layer in layers}) == 1
    csa = layers[1]
    assert csa.index_keys.table is csa.entries.table
    assert csa.index_state.table is csa.state.table
    assert csa.state.table is not layers[2].state.table
    assert isinstance(model.new_cache(max_sequences=1, max_tokens=1, max_step_tokens=1), PagedCache)
