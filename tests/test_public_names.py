"""Are the promised names importable from the top, and do the guide's snippets run on them?"""

import subprocess
import sys

import pytest

import behrt

GUIDE_CHECK_PARAMETER_COUNTS = """
from behrt import count_parameters

params = count_parameters(model)
print(f"Total: {params['total']:,}")
print(f"Trainable: {params['trainable']:,} ({params['trainable_percent']:.1f}%)")
print(f"LoRA: {params['lora']:,} ({params['lora_percent']:.1f}%)")
"""

GUIDE_THE_FIX = """
from behrt import apply_lora_to_behrt
model = apply_lora_to_behrt(
    model,
    rank=16,
    freeze_base=True,        # Freeze transformer encoder
    train_embeddings=True,   # ✅ Unfreeze embeddings (must learn from scratch)
    train_head=True          # ✅ Unfreeze MLM head (must learn to predict)
)
"""

GUIDE_CHECK_MODEL_PARAMETERS = """
from behrt import count_parameters
from behrt import BEHRT, BEHRTConfig

config = BEHRTConfig.large(vocab_size=1000)
model = BEHRT(config)

# Before LoRA
params = count_parameters(model)
print(f"Before LoRA: {params['trainable_percent']:.1f}% trainable")

# After LoRA
from behrt import apply_lora_to_behrt
model = apply_lora_to_behrt(model, rank=16)
params = count_parameters(model)
print(f"After LoRA: {params['trainable_percent']:.1f}% trainable")
"""

GUIDE_WHICH_LAYERS_HAVE_LORA = """
# Check which layers have LoRA
for name, module in model.named_modules():
    if 'lora' in name.lower():
        print(f"LoRA applied to: {name}")
"""


def test_every_public_name_is_importable_from_the_top():
    names = ["BEHRT", "BEHRTForMaskedLM", "BEHRTConfig", "apply_lora_to_behrt", "count_parameters", "load_run"]
    assert set(names) <= set(dir(behrt)) & set(behrt.__all__)
    for name in names:
        assert getattr(behrt, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'behrt' has no attribute 'BERT'"):
        _ = behrt.BERT


def test_importing_the_package_imports_no_heavy_library():
    code = (
        "import sys, behrt; behrt.__version__; dir(behrt); behrt.BEHRTConfig; "
        "print(sorted({'torch', 'mlflow', 'polars', 'sklearn'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_guides_snippet_on_model_parameters_runs(capsys: pytest.CaptureFixture[str]):
    exec(GUIDE_CHECK_MODEL_PARAMETERS, {})
    # 576,000 of the embeddings and 393,216 of 24 adapters, out of 19,884,544
    assert capsys.readouterr().out == "Before LoRA: 100.0% trainable\nAfter LoRA: 4.9% trainable\n"


def test_the_guides_other_snippets_run_and_name_the_adapted_layers(capsys: pytest.CaptureFixture[str]):
    names = {"model": behrt.BEHRTForMaskedLM(behrt.BEHRTConfig.small(vocab_size=1000))}
    exec(GUIDE_THE_FIX, names)
    exec(GUIDE_CHECK_PARAMETER_COUNTS, names)
    assert capsys.readouterr().out == "Total: 685,160\nTrainable: 288,360 (42.1%)\nLoRA: 32,768 (4.8%)\n"
    exec(GUIDE_WHICH_LAYERS_HAVE_LORA, names)
    assert capsys.readouterr().out.splitlines() == [
        f"LoRA applied to: behrt.encoder.layers.{layer}.attention.{projection}.lora"
        for layer in range(2)
        for projection in ("query", "key", "value", "output")
    ]
