"""Chinese sentences of the small world: measure words, and whatever describes comes before."""

from __future__ import annotations

from fastvlm.florenz.world.scene import Group, Scene

CASES = ("plain",)
# measure word and noun
NOUNS = {
    "ball": ("个", "球"), "star": ("颗", "星星"), "house": ("座", "房子"), "tree": ("棵", "树"),
    "boat": ("艘", "船"), "fish": ("条", "鱼"), "cup": ("只", "杯子"), "flower": ("朵", "花"),
    "car": ("辆", "汽车"), "heart": ("颗", "心"), "hat": ("顶", "帽子"), "mushroom": ("个", "蘑菇"),
}  # fmt: skip
COLOURS = {
    "red": "红色", "blue": "蓝色", "green": "绿色", "yellow": "黄色", "black": "黑色",
    "white": "白色", "orange": "橙色", "purple": "紫色",
}  # fmt: skip
SIZES = {"small": "小", "big": "大"}
NUMBERS = ("一", "两", "三", "四")
RELATIONS = {"left of": "左边", "right of": "右边", "above": "上方", "below": "下方"}
PLACES = {
    "meadow": "草地上", "beach": "沙滩上", "snow": "雪地里", "street": "街道上", "night": "夜空下"
}  # fmt: skip


def noun_phrase(group: Group, case: str) -> str:
    measure, noun = NOUNS[group.kind]
    number, colour = NUMBERS[group.count - 1], COLOURS[group.colour]
    return f"{number}{measure}{colour}的{SIZES.get(group.size or '', '')}{noun}"


def sentence(scene: Scene, frame: str) -> str:
    first, place = noun_phrase(scene.first, "plain"), PLACES.get(scene.place or "", "")
    if scene.second is not None and scene.relation is not None:
        beside = noun_phrase(scene.second, "plain") + RELATIONS[scene.relation]
        first = f"{beside}的{first}"
    if frame == "exists":
        return f"{place or '这里'}有{first}。"
    begin = "图为" if frame == "shows" else "可以看到"
    return f"{begin}{place}{'的' if place else ''}{first}。"
