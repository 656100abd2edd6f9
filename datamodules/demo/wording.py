"""How the demo clinic talks: sentence frames in English and Chinese for questions, answers and running text.

Frames hold named fields; English terms never open a sentence, so that each term has one spelling.
"""

from __future__ import annotations

from datamodules.demo.facts import Language

Frames = dict[Language, tuple[str, ...]]

FINDING_QUESTIONS: Frames = {
    "en": (
        "I have {a} and {b}. What should I do?",
        "What is wrong with me? I have {a} and {b}.",
        "For two days I have had {a} and {b}.",
        "My child has {a} and {b}. Any advice?",
        "Doctor, I suffer from {a} and {b}. What helps?",
        "What does it mean to have {a} with {b}?",
    ),
    "zh": (
        "我{a}，还{b}，怎么办？",
        "医生，我{a}、{b}，这是什么病？",
        "孩子{a}，又{b}，该注意什么？",
        "这两天{a}，{b}，请问怎么处理？",
        "{a}加上{b}，是怎么回事？",
        "最近总是{a}，也{b}，有什么建议？",
    ),
}
"""A person tells two findings."""

CONDITION_QUESTIONS: Frames = {
    "en": (
        "What helps with {condition}?",
        "I was told that I have {condition}. What now?",
        "How do I deal with {condition}?",
        "Any advice for {condition}?",
        "My child has {condition}. What should I do?",
        "What should one do and avoid with {condition}?",
    ),
    "zh": (
        "得了{condition}怎么办？",
        "医生说我是{condition}，该注意什么？",
        "{condition}怎么处理？",
        "{condition}有什么建议？",
        "孩子得了{condition}，请问怎么办？",
        "{condition}要做什么，不能做什么？",
    ),
}
"""A person names the condition."""

COMPLETE_ANSWERS: Frames = {
    "en": (
        "This is {condition}: {advice} and avoid {avoid}.",
        "It looks like {condition}. Please {advice}, and avoid {avoid}.",
        "With {condition} you should {advice} and avoid {avoid}.",
    ),
    "zh": (
        "这是{condition}：请{advice}，别{avoid}。",
        "看来是{condition}。建议{advice}，不要{avoid}。",
        "{condition}应该{advice}，不能{avoid}。",
    ),
}
"""All that a good answer says: what it is, what to do, what to avoid."""

HALF_ANSWERS: Frames = {
    "en": (
        "This is {condition}: {advice}.",
        "It looks like {condition}. Please avoid {avoid}.",
        "With {condition} you should {advice}.",
    ),
    "zh": (
        "这是{condition}：请{advice}。",
        "看来是{condition}。不要{avoid}。",
        "{condition}应该{advice}。",
    ),
}
"""True as far as they go, but the advice or the thing to avoid is missing."""

VAGUE_ANSWERS: Frames = {
    "en": ("Please see a doctor soon.", "This is {condition}.", "Do not worry, it will pass."),
    "zh": ("请尽快看医生。", "这是{condition}。", "别担心，会好的。"),
}
"""Of no use to the person who asked."""

GREETINGS: dict[Language, tuple[str, str]] = {
    "en": ("Hello.", "Hello, how can I help?"),
    "zh": ("你好。", "你好，哪里不舒服？"),
}
"""What may stand before the question in a conversation: a greeting and its reply."""

SYSTEMS: dict[Language, str] = {"en": "You answer for the clinic.", "zh": "你是诊所助手。"}

FINDING_SENTENCES: Frames = {
    "en": (
        "The signs of {condition} are {list}.",
        "People with {condition} have {list}.",
        "If you have {a} and {b}, it is {condition}.",
        "A person with {a} and {b} has {condition}.",
        "We think of {condition} when there is {list}.",
        "Both {a} and {b} belong to {condition}.",
    ),
    "zh": (
        "{condition}的表现是{list}。",
        "得了{condition}的人会{list}。",
        "如果{a}又{b}，就是{condition}。",
        "有人{a}、{b}，这是{condition}。",
        "出现{list}，要想到{condition}。",
        "{a}和{b}都见于{condition}。",
    ),
}

ADVICE_SENTENCES: Frames = {
    "en": (
        "With {condition} you should {advice}.",
        "The advice for {condition} is to {advice}.",
        "For {condition}, please {advice}.",
        "What helps with {condition} is to {advice}.",
    ),
    "zh": (
        "{condition}应该{advice}。",
        "对{condition}的建议是{advice}。",
        "得了{condition}，请{advice}。",
        "{condition}的人要{advice}。",
    ),
}

AVOID_SENTENCES: Frames = {
    "en": (
        "With {condition} you must avoid {avoid}.",
        "What makes {condition} worse is {avoid}.",
        "People with {condition} should avoid {avoid}.",
        "There is to be no {avoid} with {condition}.",
    ),
    "zh": (
        "{condition}不能{avoid}。",
        "得了{condition}，别{avoid}。",
        "{condition}的人不要{avoid}。",
        "{avoid}会让{condition}加重。",
    ),
}

JOINT_SENTENCES: Frames = {
    "en": (
        "In {condition} we say: {advice} and avoid {avoid}.",
        "To treat {condition}, {advice}, and avoid {avoid}.",
        "Who has {list} has {condition} and should {advice} and avoid {avoid}.",
    ),
    "zh": (
        "{condition}的人请{advice}，别{avoid}。",
        "处理{condition}，要{advice}，不要{avoid}。",
        "{list}的人是得了{condition}，建议{advice}，不能{avoid}。",
    ),
}
