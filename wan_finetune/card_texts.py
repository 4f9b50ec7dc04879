"""The words of a model card, in English and in Chinese. What begins with a dollar is filled in."""

from dataclasses import dataclass
from typing import Literal

Language = Literal["en", "zh"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """One language's words, in the order of the card."""

    title: str
    what_two: str
    what_one_of_two: str
    what_single: str
    trigger: str
    no_trigger: str
    samples: str
    sampled_with: str
    prompt: str
    base: str
    adapter: str
    use: str
    use_notes_two: str
    use_notes_single: str
    folder_of: str
    toolkit_use: str
    comfyui: str
    comfyui_two: str
    comfyui_one_of_two: str
    comfyui_single: str
    trained: str
    figures: str
    figures_note: str
    figure: str
    better: dict[str, str]
    figure_names: dict[str, str]
    intended: str
    intended_text: str
    safety: str
    safety_text: str
    licence: str
    licence_text: str
    facts: dict[str, str]
    experts: dict[str, str]
    example: str


ENGLISH = Texts(
    title="$name: a LoRA for $base",
    what_two="""A LoRA adapter for text-to-video with $base. The model has two denoisers, and so has this adapter:
`high_noise.safetensors` for `transformer` (t >= $boundary, layout and motion) and `low_noise.safetensors` for
`transformer_2` (below, texture and colour). **Load both**, each into its own.""",
    what_one_of_two="""A LoRA adapter for one of the two denoisers of $base, `$component`: `$file`. The other one
stays as it is.""",
    what_single="""A LoRA adapter for text-to-video with $base: one file, `$file`, for its one denoiser.""",
    trigger="Begin every prompt with `$trigger`, as the captions did in training.",
    no_trigger="It needs no trigger word.",
    samples="Samples",
    sampled_with="Same prompt and seed, base beside adapter: $sampling.",
    prompt="prompt",
    base="base",
    adapter="with the adapter",
    use="Use it with diffusers",
    use_notes_two="""The second `load_lora_weights` needs `load_into_transformer_2=True`; without it that file goes into
the wrong denoiser. `flow_shift` and both guidance scales are those of the samples.
`pipe.set_adapters("brand", {"transformer": 1.0, "transformer_2": 0.8})` sets the strengths.""",
    use_notes_single="`flow_shift` and the guidance scale are those of the samples.",
    folder_of="the diffusers folder of that name",
    toolkit_use="Or in three lines, with wan-finetune:",
    comfyui="Use it in ComfyUI",
    comfyui_two="""Put the files of `comfyui/` into `models/loras`, under two names. Give `high_noise` to the
*LoraLoaderModelOnly* behind the high-noise model and `low_noise` to the one behind the low-noise model, strength 1
each, and set *ModelSamplingSD3* of both to shift $shift.""",
    comfyui_one_of_two="""Put the file of `comfyui/` into `models/loras`, load it with *LoraLoaderModelOnly* behind the
model of the $expert, strength 1, and set *ModelSamplingSD3* of both models to shift $shift. The other gets no LoRA.""",
    comfyui_single="""Put the file of `comfyui/` into `models/loras`, load it with *LoraLoaderModelOnly*, strength 1,
and set *ModelSamplingSD3* to shift $shift.""",
    trained="How it was trained",
    figures="Figures",
    figures_note="Measured at the end of the training, the base beside the adapter, on prompts and clips that training "
    "never saw. Small sets: read them with the samples.",
    figure="figure",
    better={"lower": "lower is better", "higher": "higher is better", "same": "should stay"},
    figure_names={
        "look": "Distance to the look of the training clips",
        "content": "Clips with the right $what",
        "motion": "Amount of motion",
        "held_out": "Held-out loss, $expert",
    },
    intended="Intended use and limits",
    intended_text="""For clips in the look that it was trained on, whatever the subject, with prompts in English or
Chinese. What the base cannot do (long clips, legible text, exact hands and physics) the adapter cannot do either. Other
sizes, frame counts, samplers and shifts than those above have not been tried; a strength above 1 costs motion and
colour. A look learnt from few clips may bring some of their subjects along.""",
    safety="Safety",
    safety_text="""The adapter filters nothing. Whoever shows its clips to others puts a filter for prompts and pictures
before them, marks clips as generated, and makes none of real people without their consent, or in a protected style or
mark without the right to it.""",
    licence="Licence and base",
    licence_text="The adapter: $license. The base, $base, is under the licence that its own repository states "
    "(Wan-AI's models: Apache-2.0), and has to be had from there.",
    facts={
        "lora": "LoRA",
        "steps": "Steps",
        "learning_rate": "Learning rate",
        "optimizer": "Optimizer",
        "batch": "Clips in a step of one process",
        "precision": "Precision",
        "buckets": "Sizes (width x height x frames)",
        "training_shift": "Shift in training",
        "fps": "Frames a second",
        "seed": "Seed",
        "toolkit": "Made with",
    },
    experts={"high": "high-noise expert", "low": "low-noise expert", "single": "denoiser"},
    example="A woman in a red coat walks along a rainy street at night, neon lights on the wet ground.",
)

CHINESE = Texts(
    title="$name：$base 的 LoRA",
    what_two="""用于 $base 文生视频的 LoRA 适配器。该模型有两个去噪网络，本适配器也有两个文件：
`high_noise.safetensors` 用于 `transformer`（t >= $boundary，构图与运动），`low_noise.safetensors` 用于
`transformer_2`（其余部分，质感与色彩）。**两个都要加载**，各入其位。""",
    what_one_of_two="""用于 $base 两个去噪网络之一 `$component` 的 LoRA 适配器：`$file`。另一个保持原样。""",
    what_single="""用于 $base 文生视频的 LoRA 适配器：一个文件 `$file`，用于其唯一的去噪网络。""",
    trigger="每条提示词都以 `$trigger` 开头，与训练时的描述一致。",
    no_trigger="不需要触发词。",
    samples="样片",
    sampled_with="提示词与种子相同，左为基础模型，右为加载适配器之后：$sampling。",
    prompt="提示词",
    base="基础模型",
    adapter="加载适配器",
    use="在 diffusers 中使用",
    use_notes_two="""第二次 `load_lora_weights` 必须带 `load_into_transformer_2=True`，否则文件会进入错误的去噪网络。
`flow_shift` 和两个引导系数与样片一致。
用 `pipe.set_adapters("brand", {"transformer": 1.0, "transformer_2": 0.8})` 调节强度。""",
    use_notes_single="`flow_shift` 和引导系数与样片一致。",
    folder_of="同名的 diffusers 文件夹",
    toolkit_use="或者用 wan-finetune，三行即可：",
    comfyui="在 ComfyUI 中使用",
    comfyui_two="""把 `comfyui/` 里的两个文件放进 `models/loras`，各取一名。高噪声模型之后的 *LoraLoaderModelOnly* 用
`high_noise`，低噪声模型之后的用 `low_noise`，强度都是 1；两边的 *ModelSamplingSD3* 的 shift 都设为 $shift。""",
    comfyui_one_of_two="""把 `comfyui/` 里的文件放进 `models/loras`，在$expert的模型之后用 *LoraLoaderModelOnly* 加载，
强度 1，两边的 *ModelSamplingSD3* 的 shift 都设为 $shift。另一个模型不加载 LoRA。""",
    comfyui_single="""把 `comfyui/` 里的文件放进 `models/loras`，用 *LoraLoaderModelOnly* 加载，强度 1，并把
*ModelSamplingSD3* 的 shift 设为 $shift。""",
    trained="训练方式",
    figures="指标",
    figures_note="训练结束时测得，基础模型与适配器对照，提示词和片段都不在训练集中。样本不多，请结合样片来看。",
    figure="指标",
    better={"lower": "越低越好", "higher": "越高越好", "same": "应保持不变"},
    figure_names={
        "look": "与训练片段风格的距离",
        "content": "$what 正确的片段",
        "motion": "运动量",
        "held_out": "留出损失，$expert",
    },
    intended="用途与局限",
    intended_text="""用于生成带有训练风格的视频，主题不限，提示词中英文皆可。基础模型做不到的（长视频、清晰的文字、
准确的手部和物理规律），适配器同样做不到。上面没有列出的尺寸、帧数、采样器和 shift 未经试验；强度大于 1 会损失运动和
色彩。由少量片段学到的风格，可能会带出其中的主体。""",
    safety="安全",
    safety_text="""适配器不做任何过滤。向他人展示生成的视频时，应在提示词和画面两端加上过滤，标明内容由模型生成；未经
本人同意不得生成真实人物，未获授权不得使用受保护的风格或商标。""",
    licence="许可与基础模型",
    licence_text="适配器：$license。基础模型 $base 遵循其仓库所声明的许可（Wan-AI 的模型为 Apache-2.0），"
    "需从该仓库获取。",
    facts={
        "lora": "LoRA",
        "steps": "步数",
        "learning_rate": "学习率",
        "optimizer": "优化器",
        "batch": "单进程每步的片段数",
        "precision": "精度",
        "buckets": "尺寸（宽 x 高 x 帧数）",
        "training_shift": "训练时的 shift",
        "fps": "每秒帧数",
        "seed": "随机种子",
        "toolkit": "制作工具",
    },
    experts={"high": "高噪声专家", "low": "低噪声专家", "single": "去噪网络"},
    example="夜里，一位穿红色大衣的女子走在下雨的街道上，霓虹灯映在湿漉漉的地面上。",
)

TEXTS: dict[Language, Texts] = {"en": ENGLISH, "zh": CHINESE}
