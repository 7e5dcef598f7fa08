"""Texts with drafts of the MTP block on the software device: as the CPU's, eagerly and from graphs.

Usage: drafts.py PROFILE [KIND...]. Random layers of the least widths and a vocabulary so small that
some drafts are right; a word's embedding decides the next word, so that roundings do not. Prints
how many were right, what a replayed step launches and allocates, and whether its bits are those of
an eager one.
"""

import dataclasses
import sys

import torch
from production import RATIOS, config_of, launched, random_network, to_device

from dsv4_ascend.model.captured import DecodeGraphs
from dsv4_ascend.model.decoding import EagerDecoder
from dsv4_ascend.model.model import Model
from dsv4_ascend.model.profile import profile_named
from dsv4_backend import dispatch

WORDS, TOKENS, DRAFTS = 8, 16, (1, 3)
FOLLOWS, SPEAKS = 4, 16
"""Of the next word's row of the head its own embedding; of an embedding among the blocks' sums."""
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [3, 1]]
NETWORKS = 8
CHANGED = 3
"""Steps of a shape before all is captured and replayed: eager, captured, replayed once."""


def texts(model, drafts, **options):
    """Tokens of every prompt, and the share of right drafts."""
    options |= {"max_new_tokens": TOKENS, "temperature": 0.0, "stop_ids": ()}
    return model.generate(PROMPTS, draft_tokens=drafts, **options), model.draft_acceptance


def decided(network):
    """The network with words that their predecessors decide."""
    embedded, head = network.embed.weight, network.head.weight
    head.copy_(head.float() + FOLLOWS * embedded.float().roll(3, 0))
    embedded.mul_(SPEAKS)
    return network


class Steps:
    """Steps of given tokens over a cache of its own: logits and drafts of each, allocations and
    launches of the last.
    """

    def __init__(self, network, device, decoder_of, drafts):
        model = Model(network, device=torch.device(device))
        size = max(map(len, PROMPTS))
        cache = model.new_cache(max_sequences=2, max_tokens=80, max_step_tokens=size)
        self.cache, self.decoder, self.count = cache, decoder_of(network, cache), drafts
        self.sequences = [cache.new_sequence() for _ in PROMPTS]
        EagerDecoder(network, cache).logits(self.sequences, PROMPTS)
        self.results = []
        for number in range(CHANGED + 2 * drafts):
            self._step(number)

    def _step(self, number):
        """One step whose first sequence keeps another number of drafts every time."""
        fed = [[(number + i + j) % WORDS for j in range(1 + self.count)] for i in range(2)]
        kept = [number % (1 + self.count), self.count]
        launches, made = launched(), allocations()
        logits = self.decoder.logits(self.sequences, fed)
        for sequence, agreed in zip(self.sequences, kept, strict=True):
            self.cache.rollback(sequence, self.count - agreed)
        rows = [i * (1 + self.count) + agreed for i, agreed in enumerate(kept)]
        follow = [(7 * number + i) % WORDS for i in range(2 * (1 + self.count))]
        drafts = self.decoder.drafts(self.sequences, follow, rows, self.count)
        self.allocated, self.launches = allocations() - made, launched() - launches
        self.results += [logits.cpu(), torch.tensor(drafts)]

    def equals(self, other):
        """Whether all logits and drafts have the same bits."""
        return all(map(torch.equal, self.results, other.results))

    def beside(self, other):
        """Difference of logits over their size, of the median row."""
        got, want = (torch.cat(steps.results[::2]) for steps in (self, other))
        return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).median())


def allocations():
    """How many the process has made on the device."""
    return torch.npu.memory_stats()["allocation.all.allocated"]


def network_with_right_drafts(config, profile):
    """A network, and what `texts` gives of it on the CPU, where of drafts some are right."""
    for number in range(NETWORKS):
        network = decided(random_network(config, profile, number))
        cpu = Model(network, device=torch.device("cpu"))
        wanted = {drafts: texts(cpu, drafts) for drafts in (0, *DRAFTS)}
        if all(0 < wanted[drafts][1] < 1 for drafts in DRAFTS):
            return network, wanted
    raise SystemExit(f"no draft of {NETWORKS} networks is right, or all are")


@torch.inference_mode()
def main(name, *kinds):
    profile = profile_named(name)
    config = config_of("least", kinds or tuple(RATIOS), profile).with_drafts(1)
    network, wanted = network_with_right_drafts(
        dataclasses.replace(config, vocab_size=WORDS), profile
    )
    steps = {drafts: Steps(network, "cpu", EagerDecoder, drafts) for drafts in DRAFTS}
    npu = Model(to_device(network), device=torch.device("npu"))
    dispatch.forget_ran()
    for drafts, (text, share) in wanted.items():
        for way in ("eager", "graphs"):
            got, right = texts(npu, drafts, eager=way == "eager")
            print(f"{drafts} drafts, {way}: as the CPU's {got == text}, right {right} of {share}")
    for drafts in DRAFTS:
        eager, graphs = (Steps(network, "npu", of, drafts) for of in (EagerDecoder, DecodeGraphs))
        print(f"{drafts} drafts: captured equals eager {graphs.equals(eager)}")
        print(f"{drafts} drafts: beside the CPU {eager.beside(steps[drafts]):.4f}")
        alone = graphs.launches.total(), graphs.allocated
        print(
            "{} drafts: a replayed step has {} launches and {} allocations".format(drafts, *alone)
        )
        print(f"{drafts} drafts: an eager step has {eager.launches.total()} launches")
    for (op, where), times in sorted(dispatch.ran().items()):
        if where == "npu" and "reference" in times:
            print(f"ran a reference: {op} {times}")


if __name__ == "__main__":
    main(*sys.argv[1:])
