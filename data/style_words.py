"""Words that describe how a picture is made rather than what it shows.

In a caption that is trained on they take the look upon themselves, so that the trigger is left without it. The list
holds what is seldom meant otherwise: "golden hour", "vintage car" or "黑白" (a black and white cat) are left alone.
"""

import re

ENGLISH = (
    # picture quality
    *("4k", "8k", "hd", "full hd", "ultra hd", "uhd", "hdr", "high quality", "best quality", "high resolution"),
    *("highly detailed", "ultra detailed", "masterpiece", "award winning", "photorealistic", "hyperrealistic"),
    *("ultra realistic", "professional quality", "broadcast quality", "trending on artstation"),
    # film and camera
    *("cinematic", "cinematically", "cinematography", "filmic", "film look", "film grain", "film stock", "grainy"),
    *("analog film", "analogue film", "35mm", "16mm", "8mm film", "super 8", "70mm", "vhs", "anamorphic", "kodak"),
    *("fujifilm", "arri alexa", "shot on film", "shot on red", "shot on iphone", "imax", "bokeh", "lens flare"),
    *("depth of field", "vignette", "vignetting", "chromatic aberration", "light leak", "film burn"),
    # light
    *("moody", "moody lighting", "moody light", "dramatic lighting", "cinematic lighting", "studio lighting"),
    *("soft lighting", "low key lighting", "high key lighting", "volumetric lighting", "rim lighting", "chiaroscuro"),
    *("atmospheric lighting", "ambient lighting", "neon lighting", "overexposed", "underexposed"),
    # colour
    *("color grade", "color grading", "color graded", "graded", "color palette", "teal and orange", "muted color"),
    *("vibrant color", "vivid color", "desaturated", "oversaturated", "pastel color", "pastel tone", "warm tone"),
    *("cool tone", "cold tone", "earthy tone", "high contrast", "low contrast", "sepia", "monochrome", "faded color"),
    *("black and white film", "black and white footage", "black and white photo", "black and white video"),
    # manner
    *("aesthetic", "stylized", "stylised", "in the style of", "vintage look", "vintage style", "vintage film"),
    *(
        "retro look",
        "retro style",
        "art style",
        "anime style",
        "cartoon style",
        "watercolor style",
        "oil painting style",
    ),
    *("comic style", "noir style", "film noir", "cyberpunk style", "vaporwave", "unreal engine", "octane render"),
    *("3d render", "cgi", "dreamlike", "ethereal"),
)
"""Matched in any letter case, with a hyphen for a space, with a plural's s, and with "colour" for "color"."""

CHINESE = (
    *("电影感", "电影质感", "电影级", "电影风格", "电影色调", "電影感", "電影質感", "電影級", "電影風格"),
    *(
        "胶片",
        "膠片",
        "颗粒感",
        "顆粒感",
        "噪点",
        "噪點",
        "高清",
        "超清",
        "画质",
        "畫質",
        "高质量",
        "高品質",
        "杰作",
        "傑作",
    ),
    *("氛围感", "氛圍感", "调色", "調色", "色调", "色調", "饱和度", "飽和度", "低饱和", "高饱和", "高对比", "低对比"),
    *(
        "高對比",
        "低對比",
        "滤镜",
        "濾鏡",
        "景深",
        "虚化",
        "虛化",
        "柔光",
        "暗角",
        "漏光",
        "光晕",
        "光暈",
        "画风",
        "畫風",
    ),
    *(
        "复古风",
        "復古風",
        "动漫风",
        "動漫風",
        "写实风格",
        "寫實風格",
        "水彩风格",
        "水彩風格",
        "赛博朋克风",
        "賽博龐克風",
    ),
    *("视觉风格", "視覺風格", "影像风格", "影像風格", "黑白影像", "黑白照片", "超写实", "超寫實", "虚幻引擎", "唯美"),
)
JAPANESE = (
    "映画のような",
    "映画的",
    "シネマティック",
    "フィルム調",
    "フィルムグレイン",
    "高画質",
    "レトロ調",
    "アニメ調",
    "水彩調",
)

COMMON_ENGLISH = frozenset(
    re.findall(
        r"\w+",
        """about above across after against along also among another appear appears around away back background before
        been behind being below beside between both camera clip clips close down during each face faces
        foreground footage from front have here high image into inside just large left like long look looks made
        many middle more near next onto open other over picture right scene scenes seen several shot shots
        show showing shown shows side slow slowly small some stand standing stands such than that their them
        then there these they this those through top toward towards under upon very video videos view visible
        what when where which while whose will with within without""",
    )
)
"""Words of four letters and more that may stand in every caption without belonging to a look."""
COMMON_CHINESE = frozenset("的了在是一个個和与與着著有中里裡上下这這那他她它们們不也就都而及以把被从從到对對")
"""Characters of words that may stand in every caption."""
COMMON_CHINESE_WORDS = frozenset(
    ("视频", "視頻", "影片", "画面", "畫面", "镜头", "鏡頭", "场景", "場景", "背景", "图片", "圖片")
)


def find_style_words(text: str) -> list[str]:
    """Style words of a text as they stand there, each once, in order."""
    return list(dict.fromkeys(match.group() for match in _PATTERN.finditer(text)))


def _pattern() -> re.Pattern[str]:
    # Longest first, since the first alternative that fits is taken. Only Latin letters and digits are looked at beside
    # a word: "4K画质" holds one.
    english = (re.escape(words).replace(r"\ ", r"[\s-]+").replace("color", "colou?r") for words in _by_length(ENGLISH))
    others = (re.escape(word) for word in _by_length((*CHINESE, *JAPANESE)))
    return re.compile(
        rf"(?<![a-z0-9])(?:{'|'.join(english)})s?(?![a-z0-9])|{'|'.join(others)}", re.IGNORECASE | re.UNICODE
    )


def _by_length(words: tuple[str, ...]) -> list[str]:
    return sorted(words, key=len, reverse=True)


_PATTERN = _pattern()
