"""Units: what stands behind a number, so that 5 m is not 5 cm, and 90 min is 1.5 h.

In:  "cm", "km/h", "square meters", "平方厘米", "apples", "只猫".  Out: a `Unit`, or None for a text that is none.

A unit is its dimension and its size, 1 km/h = (length / time, 5/18). What people count (apples) is a dimension of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

TABLE = """
length  1        m meter metre 米 公尺
length  1000     km kilometer kilometre 千米 公里
length  1/10     dm decimeter decimetre 分米
length  1/100    cm centimeter centimetre 厘米 公分
length  1/1000   mm millimeter millimetre 毫米
length  1/1000000       μm um micrometer micrometre micron 微米
length  1/1000000000    nm nanometer nanometre 纳米
length  254/10000       in inch inches " 英寸
length  3048/10000      ft foot feet ' 英尺
length  9144/10000      yd yard 码
length  1609344/1000    mi mile 英里
area    10000    ha hectare 公顷
volume  1/1000   L l liter litre 升
volume  1/1000000       mL ml cc milliliter millilitre 毫升
mass    1        g gram gramme 克
mass    1000     kg kilo kilogram 千克 公斤
mass    500      斤
mass    1/1000   mg milligram 毫克
mass    1000000  t ton tonne 吨
pound   1        lb lbs pound 磅
time    1        s sec second 秒 秒钟
time    1/1000   ms millisecond 毫秒
time    60       min mins minute 分钟
time    3600     h hr hrs hour 小时 时 个小时 钟头
time    86400    d day 天 日
week    1        week 周 星期
month   1        month 月 个月
year    1        yr yrs year 年 岁 years_old year_old
degree  1        ° deg degree 度 °C celsius degrees_celsius degree_celsius 摄氏度
fahrenheit  1    °F fahrenheit degrees_fahrenheit degree_fahrenheit 华氏度
radian  1        rad radian 弧度
kelvin  1        K kelvin 开尔文
percent 1        % \\% percent per_cent pct 百分点
dollar  1        $ USD dollar buck 美元
dollar  1/100    cent ¢ 美分
yuan    1        元 ¥ RMB CNY yuan 块钱 人民币
yuan    1/10     角
euro    1        € EUR euro 欧元
sterling 1       £ GBP 英镑
newton  1        N newton 牛 牛顿
newton  1000     kN
joule   1        J joule 焦 焦耳
joule   1000     kJ 千焦
calorie 1        cal calorie 卡
calorie 1000     kcal 千卡 大卡
watt    1        W watt 瓦 瓦特
watt    1000     kW kilowatt
pascal  1        Pa pascal 帕 帕斯卡
pascal  1000     kPa
volt    1        V volt 伏 伏特
ampere  1        A amp ampere 安 安培
ampere  1/1000   mA 毫安
ohm     1        Ω ohm \\Omega 欧 欧姆
ohm     1000     kΩ
hertz   1        Hz hertz 赫兹
hertz   1000     kHz
hertz   1000000  MHz
mole    1        mol mole 摩尔
bytes   1        byte bytes 字节
kilobyte 1       KB
megabyte 1       MB
gigabyte 1       GB
"""
NEUTRAL = "unit 单位 个 分 点"  # a dimension that fits every other: "12 square units" is 12 cm^2
MEASURES = ("个只张条本头匹辆支枝把棵朵颗块件台座位名根片粒种页盒瓶杯袋包箱篮艘架束串对双份组幅副套节层排"  # 三只猫
            "行列道题次回处间栋口枚盏顶")  # fmt: skip
SPEEDS = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h", "km/hr": "km/h"}
NO_NOUN = re.compile(  # words behind a number that take it back, add to it, or make it a date
    r"\b(or|and|to|so|not|no|maybe|perhaps|probably|possibly|roughly|about|around|approx\w*|nearly|almost|likely|guess|think|"
    r"unsure|uncertain|ish|plus|minus|half|dozen|hundred|thousand|million|billion|am|pm|if|but|either|between|at|least|most|over|under|up|odd|"
    r"(jan|febr)uary|march|april|may|june|july|august|(septem|octo|novem|decem)ber|one|two|three|four|five|six|seven|eight|nine|"
    r"ten)\b|[或和与及约吧呢多不到几半零一二两三四五六七八九十百千万亿]|左右|可能|上下|以上|以下|至少|最多|也许|大概")


@dataclass(frozen=True)
class Unit:
    """Size in basic units of its dimension; the dimension as (name, power) pairs, () where it fits every other."""

    dimension: tuple[tuple[str, int], ...] = ()
    size: Fraction = Fraction(1)


def table() -> dict[str, Unit]:
    """Name -> unit, of one word each; areas and volumes are powers of a length."""
    names = {name: Unit() for name in [*NEUTRAL.split(), *MEASURES]}
    for line in TABLE.strip().splitlines():
        dimension, size, *words = line.split()
        powers = {"area": ("length", 2), "volume": ("length", 3)}.get(dimension, (dimension, 1))
        names |= {word.replace("_", " "): Unit((powers,), Fraction(size)) for word in words}
    return names


NAMES = table()
SMALL = {name.lower(): found for name, found in reversed(NAMES.items())}
POWER_WORDS = {"square": 2, "sq": 2, "平方": 2, "cubic": 3, "立方": 3, "cu": 3}
FACTOR = re.compile(r"(?:(square|sq|cubic|cu|平方|立方)\.?\s*)?(.+?)\s*(?:\^?\s*\{?\s*(-?[123])\s*\}?)?\.?")


def named(name: str) -> Unit | None:
    """The unit of one name, in the singular or plural; capitals count only where two units differ by them."""
    for key in (name, name.removesuffix("s")):
        if found := NAMES.get(key) or SMALL.get(key.lower()):
            return found
    return None


@lru_cache(maxsize=1024)
def unit(text: str) -> Unit | None:
    """The unit of a text: one name, or a product or quotient of names with powers; None for any other text."""
    text = SPEEDS.get(text.strip().lower(), text.strip())
    dimension: dict[str, int] = {}
    size, sign = Fraction(1), 1
    for k, part in enumerate(re.split(r"\s*(/|\*|·|\\cdot|\bper\b|每)\s*", text.replace("per cent", "percent"))):
        if k % 2:  # a sign between two names
            sign = -1 if part in ("/", "per", "每") else sign
            continue
        match = FACTOR.fullmatch(part)
        found = match and (named(part) or named(match[2]))
        if not match or not found:
            return None
        power = 1 if named(part) else sign * POWER_WORDS.get(match[1], 1) * int(match[3] or 1)
        power = sign if named(part) else power
        size *= found.size**power
        for name, exponent in found.dimension:
            dimension[name] = dimension.get(name, 0) + exponent * power
    return Unit(tuple(sorted((name, power) for name, power in dimension.items() if power)), size)


def counted(text: str, measured: bool) -> Unit | None:
    """What is counted: "apples", "red apples", "只猫"; its last word in the singular is the dimension.

    measured   a Chinese noun needs its measure word, as behind a Chinese number: 三只猫 counts cats, 三角形 counts nothing
    """
    if NO_NOUN.search(text.lower()):
        return None
    if re.fullmatch(r"\s+[A-Za-z-]{2,20}(\s+[A-Za-z-]{2,20})?", text):
        return Unit(((text.lower().split()[-1].removesuffix("s"), 1),))
    match = re.fullmatch(rf"\s*([{MEASURES}]?)\s*([\u4e00-\u9fff]{{1,6}})", text)
    return Unit(((match[2], 1),)) if match and (match[1] or not measured) else None
