"""The control tokens of the release's prompts (spec/v4.md 9.1)."""

from __future__ import annotations

from dsv4_ascend.chat.prompt_text import Marker

BOS, EOS = Marker("<｜begin▁of▁sentence｜>"), Marker("<｜end▁of▁sentence｜>")
USER, ASSISTANT = Marker("<｜User｜>"), Marker("<｜Assistant｜>")
REMINDER = Marker("<｜latest_reminder｜>")
THINK, END_THINK, DSML = Marker("<think>"), Marker("</think>"), Marker("｜DSML｜")
TASKS = {
    name: Marker(f"<｜{name}｜>")
    for name in ("action", "query", "authority", "domain", "title", "read_url")
}
