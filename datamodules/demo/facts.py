"""What is true in the demo clinic: a closed little world, invented for learning and no medical advice.

Each condition has four findings, one right advice and one thing to avoid. Findings are shared between conditions,
so that one finding alone tells nothing; a pair of findings does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")


@dataclass(frozen=True)
class Term:
    """One thing of the world under its English and its Chinese name."""

    en: str
    zh: str

    def __getitem__(self, language: Language) -> str:
        return getattr(self, language)


@dataclass(frozen=True)
class Condition:
    """What the clinic knows about one condition."""

    name: Term
    findings: tuple[Term, ...]
    advice: Term
    avoid: Term


FINDINGS = {
    term.en: term
    for term in (
        Term("fever", "发烧"),
        Term("chills", "发冷"),
        Term("a cough", "咳嗽"),
        Term("a sore throat", "咽痛"),
        Term("sneezing", "打喷嚏"),
        Term("a runny nose", "流鼻涕"),
        Term("watery eyes", "流泪"),
        Term("red eyes", "眼红"),
        Term("blurred sight", "眼花"),
        Term("headache", "头痛"),
        Term("dizziness", "头晕"),
        Term("ear pain", "耳痛"),
        Term("ringing ears", "耳鸣"),
        Term("toothache", "牙痛"),
        Term("swollen gums", "牙龈肿"),
        Term("bad breath", "口臭"),
        Term("thirst", "口渴"),
        Term("heartburn", "烧心"),
        Term("nausea", "恶心"),
        Term("belly pain", "肚子痛"),
        Term("loose stool", "腹泻"),
        Term("bloating", "腹胀"),
        Term("chest pain", "胸痛"),
        Term("short breath", "气短"),
        Term("palpitations", "心慌"),
        Term("poor sleep", "失眠"),
        Term("tiredness", "乏力"),
        Term("weight loss", "消瘦"),
        Term("sweating", "多汗"),
        Term("pale skin", "脸色白"),
        Term("a rash", "起皮疹"),
        Term("itching", "皮肤痒"),
        Term("blisters", "起水泡"),
        Term("joint pain", "关节痛"),
        Term("back pain", "腰痛"),
        Term("numb legs", "腿麻"),
        Term("swollen feet", "脚肿"),
        Term("frequent urine", "尿频"),
    )
}

ADVICE = {
    key: Term(en, zh)
    for key, en, zh in (
        ("bed", "rest in bed", "卧床休息"),
        ("water", "drink warm water", "多喝温水"),
        ("mask", "wear a mask", "戴口罩"),
        ("porridge", "eat plain porridge", "喝白粥"),
        ("ice", "use an ice pack", "用冰袋敷"),
        ("heat", "use a heat pack", "用热水敷"),
        ("blood", "take a blood test", "去验血"),
        ("urine", "take a urine test", "去验尿"),
        ("scan", "take a chest scan", "去拍胸片"),
        ("heart", "see the heart clinic", "看心内科"),
        ("eye", "see the eye clinic", "看眼科"),
        ("skin", "see the skin clinic", "看皮肤科"),
        ("ear", "see the ear clinic", "看耳科"),
        ("tooth", "see the tooth clinic", "看牙科"),
    )
}

AVOID = {
    key: Term(en, zh)
    for key, en, zh in (
        ("coffee", "coffee", "喝咖啡"),
        ("alcohol", "alcohol", "喝酒"),
        ("sweets", "sweets", "吃甜食"),
        ("spice", "spicy food", "吃辣"),
        ("salt", "salty food", "吃咸"),
        ("seafood", "seafood", "吃海鲜"),
        ("smoke", "smoking", "吸烟"),
        ("lifting", "heavy lifting", "提重物"),
        ("running", "running", "跑步"),
        ("swimming", "swimming", "游泳"),
        ("screens", "screens", "看手机"),
        ("scratching", "scratching", "抓挠"),
        ("nights", "late nights", "熬夜"),
    )
}

_ROWS = (
    ("flu", "流感", "fever", "chills", "headache", "a cough", "bed", "nights"),
    ("a cold", "感冒", "sneezing", "a sore throat", "a cough", "headache", "water", "smoke"),
    ("hay fever", "花粉症", "sneezing", "watery eyes", "a runny nose", "itching", "mask", "running"),
    ("bronchitis", "支气管炎", "a cough", "fever", "a runny nose", "tiredness", "water", "running"),
    ("pneumonia", "肺炎", "fever", "chest pain", "short breath", "sweating", "scan", "smoke"),
    ("asthma", "哮喘", "short breath", "a cough", "itching", "poor sleep", "mask", "smoke"),
    ("migraine", "偏头痛", "headache", "nausea", "blurred sight", "dizziness", "bed", "screens"),
    ("gastritis", "胃炎", "belly pain", "nausea", "bloating", "bad breath", "porridge", "alcohol"),
    ("food poisoning", "食物中毒", "loose stool", "belly pain", "chills", "sweating", "porridge", "seafood"),
    ("acid reflux", "胃反流", "heartburn", "bad breath", "chest pain", "a sore throat", "bed", "coffee"),
    ("anemia", "贫血", "pale skin", "tiredness", "dizziness", "short breath", "blood", "nights"),
    ("diabetes", "糖尿病", "thirst", "frequent urine", "weight loss", "blurred sight", "blood", "sweets"),
    ("hyperthyroidism", "甲亢", "weight loss", "palpitations", "sweating", "poor sleep", "blood", "seafood"),
    ("heart failure", "心衰", "swollen feet", "short breath", "palpitations", "tiredness", "heart", "salt"),
    ("angina", "心绞痛", "chest pain", "palpitations", "pale skin", "heartburn", "heart", "lifting"),
    ("gout", "痛风", "joint pain", "swollen feet", "fever", "poor sleep", "ice", "seafood"),
    ("arthritis", "关节炎", "joint pain", "back pain", "tiredness", "weight loss", "heat", "running"),
    ("sciatica", "坐骨神经痛", "back pain", "numb legs", "poor sleep", "swollen feet", "heat", "lifting"),
    ("eczema", "湿疹", "itching", "a rash", "poor sleep", "blisters", "skin", "scratching"),
    ("shingles", "带状疱疹", "blisters", "a rash", "back pain", "fever", "skin", "spice"),
    ("pink eye", "红眼病", "red eyes", "watery eyes", "itching", "blurred sight", "eye", "swimming"),
    ("otitis", "中耳炎", "ear pain", "ringing ears", "fever", "dizziness", "ear", "swimming"),
    ("gum disease", "牙周炎", "swollen gums", "toothache", "bad breath", "headache", "tooth", "sweets"),
    ("cystitis", "膀胱炎", "frequent urine", "belly pain", "back pain", "thirst", "urine", "coffee"),
)

CONDITIONS = tuple(
    Condition(Term(en, zh), tuple(FINDINGS[f] for f in findings), ADVICE[advice], AVOID[avoid])
    for en, zh, *findings, advice, avoid in _ROWS
)
BY_NAME = {condition.name.en: condition for condition in CONDITIONS}
