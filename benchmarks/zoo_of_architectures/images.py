"""Classifiers and encoders of images."""

from __future__ import annotations

from typing import Any

from zoo_of_architectures.entry import Architecture, Built, called, configured, image, named


def torchvision(name: str, size: int = 64, **settings: Any) -> Any:
    """A builder of a torchvision classifier."""
    return called(f"torchvision.models:{name}", image(size), num_classes=10, **settings)


def timm(name: str, size: int = 64, **settings: Any) -> Any:
    """A builder of a timm classifier."""
    return called("timm:create_model", image(size), name, num_classes=10, **settings)


def resnext() -> Built:
    """torchvision's ResNeXt with a block per stage."""
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, groups=32, width_per_group=4), image(64)()


def vgg() -> Built:
    """timm's VGG of narrow stages."""
    from timm.models.vgg import VGG

    plan = [32, "M", 64, "M", 128, 128, "M", 128, 128, "M", 128, 128, "M"]
    return VGG(plan, num_classes=10, mlp_ratio=0.05), image(64)()


def nfnet() -> Built:
    """timm's NFNet of narrow stages, with the padding of TensorFlow."""
    from timm.models.nfnet import NfCfg, NormFreeNet

    settings = NfCfg(
        depths=(1, 1, 1, 1), channels=(64, 128, 192, 256), group_size=32, bottle_ratio=0.5, extra_conv=True,
        num_features=512, act_layer="gelu", attn_layer="se", attn_kwargs={"rd_ratio": 0.5}, same_padding=True,
    )  # fmt: skip
    return NormFreeNet(settings, num_classes=10), image(64)()


def metaformer(early: str, late: str) -> Any:
    """A builder of timm's MetaFormer that mixes tokens one way in the first two stages, and another in the last two."""

    def make() -> Built:
        from timm.models import metaformer as metaformers

        mixers = [getattr(metaformers, mixer) for mixer in (early, early, late, late)]
        flat, spatial = metaformers.LayerNormNoBias, metaformers.LayerNorm2dNoBias
        norms: Any = [flat if mixer is metaformers.Attention else spatial for mixer in mixers]
        network = metaformers.MetaFormer(
            num_classes=10, depths=(1, 1, 1, 1), dims=(32, 64, 128, 256), token_mixers=mixers, norm_layers=norms
        )
        return network, image(64)()

    return make


def swin_v2() -> Built:
    """torchvision's Swin of the second version."""
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    blocks = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    sizes = {"patch_size": [4, 4], "embed_dim": 48, "depths": [2, 2], "num_heads": [3, 6], "window_size": [4, 4]}
    return SwinTransformer(**sizes, **blocks, num_classes=10), image(64)()


VISION = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
SMALL_VISION = {**VISION, "image_size": 32, "patch_size": 8}
PIXELS = named("pixel_values", image(32))
NARROW = {"img_size": 64, "embed_dim": 48, "depths": (2, 2), "num_heads": (3, 6), "window_size": 4}

CLASSIFIERS = (
    Architecture("resnet18", "ResNet", "torchvision", torchvision("resnet18")),
    Architecture("resnet10t", "ResNet", "timm", timm("resnet10t")),
    Architecture("seresnet", "SE-ResNet", "timm", timm("legacy_seresnet18")),
    Architecture("resnest14d", "ResNeSt", "timm", timm("resnest14d")),
    Architecture("resnext", "ResNeXt", "torchvision", resnext),
    Architecture("regnet_y_400mf", "RegNet", "torchvision", torchvision("regnet_y_400mf")),
    Architecture("densenet", "DenseNet", "torchvision",
                 torchvision("DenseNet", growth_rate=16, block_config=(3, 4, 6, 4)), tested=True),
    Architecture("efficientnet_b0", "EfficientNet", "torchvision", torchvision("efficientnet_b0")),
    Architecture("tf_efficientnet_b0", "EfficientNet", "timm", timm("tf_efficientnet_b0")),
    Architecture("tf_efficientnetv2_b0", "EfficientNetV2", "timm", timm("tf_efficientnetv2_b0")),
    Architecture("mobilenet_v2", "MobileNetV2", "torchvision", torchvision("mobilenet_v2")),
    Architecture("mobilenet_v3_small", "MobileNetV3", "torchvision", torchvision("mobilenet_v3_small"), tested=True),
    Architecture("tf_mobilenetv3_small", "MobileNetV3", "timm", timm("tf_mobilenetv3_small_075")),
    Architecture("mobilenetv4_conv_small", "MobileNetV4", "timm", timm("mobilenetv4_conv_small")),
    Architecture("mnasnet0_5", "MnasNet", "torchvision", torchvision("mnasnet0_5")),
    Architecture("ghostnet_050", "GhostNet", "timm", timm("ghostnet_050")),
    Architecture("shufflenet_v2_x0_5", "ShuffleNet", "torchvision", torchvision("shufflenet_v2_x0_5"), tested=True),
    Architecture("squeezenet1_1", "SqueezeNet", "torchvision", torchvision("squeezenet1_1"), tested=True),
    Architecture("vgg", "VGG", "timm", vgg),
    Architecture("googlenet", "GoogLeNet", "torchvision", torchvision(
        "googlenet", aux_logits=False, init_weights=False)),
    Architecture("inception_v3", "Inception", "torchvision", torchvision(
        "inception_v3", 96, aux_logits=False, init_weights=False)),
    Architecture("inception_next_atto", "InceptionNeXt", "timm", timm("inception_next_atto")),
    Architecture("convnext_atto", "ConvNeXt", "timm", timm("convnext_atto")),
    Architecture("convnextv2_atto", "ConvNeXt", "timm", timm("convnextv2_atto")),
    Architecture("nf_regnet_b0", "NFNet", "timm", timm("nf_regnet_b0")),
    Architecture("nfnet", "NFNet", "timm", nfnet, tested=True),
    Architecture("bit_resnetv2", "BiT ResNetV2", "timm", called(
        "timm.models.resnetv2:ResNetV2", image(64), layers=(1, 1, 1, 1), channels=(128, 256, 512, 768), num_classes=10,
        stem_chs=32, stem_type="fixed")),
    Architecture("repvgg_a0", "RepVGG", "timm", timm("repvgg_a0")),
    Architecture("repvit_m0_9", "RepViT", "timm", timm("repvit_m0_9")),
    Architecture("hrnet", "HRNet", "timm", timm("hrnet_w18_small")),
    Architecture("dla46_c", "DLA", "timm", timm("dla46_c")),
    Architecture("botnet26t", "BoTNet", "timm", timm("botnet26t_256", img_size=64)),
    Architecture("mambaout_femto", "MambaOut", "timm", timm("mambaout_femto")),
    Architecture("vit_torchvision", "ViT", "torchvision", torchvision(
        "VisionTransformer", 32, image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=128, mlp_dim=256)),
    Architecture("vit_tiny", "ViT", "timm", timm("vit_tiny_patch16_224", img_size=64, depth=4), tested=True),
    Architecture("deit_tiny", "DeiT", "timm", timm("deit_tiny_distilled_patch16_224", img_size=64, depth=4)),
    Architecture("eva02_tiny", "EVA", "timm", timm("eva02_tiny_patch14_224", 56, img_size=56, depth=4)),
    Architecture("swin_torchvision", "Swin", "torchvision", called(
        "torchvision.models:SwinTransformer", image(64), [4, 4], 48, [2, 2], [3, 6], [4, 4], num_classes=10)),
    Architecture("swin_v2_torchvision", "Swin", "torchvision", swin_v2),
    Architecture("swin_timm", "Swin", "timm", called(
        "timm.models.swin_transformer:SwinTransformer", image(64), num_classes=10, **NARROW), tested=True),
    Architecture("maxvit_torchvision", "MaxViT", "torchvision", torchvision(
        "MaxVit", input_size=(64, 64), stem_channels=32, partition_size=4, block_channels=[32, 64],
        block_layers=[1, 1], head_dim=16, stochastic_depth_prob=0.0)),
    Architecture("maxvit_timm", "MaxViT", "timm", timm("maxvit_rmlp_pico_rw_256", 128, img_size=128)),
    Architecture("coatnet", "CoAtNet", "timm", timm("coatnet_pico_rw_224", img_size=64)),
    Architecture("mixer", "Mixer", "timm", called(
        "timm.models.mlp_mixer:MlpMixer", image(64), num_classes=10, img_size=64, patch_size=8, num_blocks=3,
        embed_dim=128), tested=True),
    Architecture("poolformer", "MetaFormer", "timm", metaformer("Pooling", "Pooling")),
    Architecture("caformer", "MetaFormer", "timm", metaformer("SepConv", "Attention")),
    Architecture("efficientformerv2_s0", "EfficientFormer", "timm", timm("efficientformerv2_s0", 224)),
    Architecture("efficientvit_b0", "EfficientViT", "timm", timm("efficientvit_b0")),
    Architecture("levit_128s", "LeViT", "timm", timm("levit_128s", 224)),
    Architecture("mobilevit_xxs", "MobileViT", "timm", timm("mobilevit_xxs")),
    Architecture("fastvit_t8", "FastViT", "timm", timm("fastvit_t8")),
    Architecture("edgenext_xx_small", "EdgeNeXt", "timm", timm("edgenext_xx_small")),
    Architecture("xcit_nano", "XCiT", "timm", timm("xcit_nano_12_p16_224")),
    Architecture("pvt_v2_b0", "PVT", "timm", timm("pvt_v2_b0")),
    Architecture("sequencer2d", "Sequencer", "timm", timm("sequencer2d_s", layers=[1, 1, 1, 1], img_size=64)),
    Architecture("dinov2", "DINOv2", "transformers", configured(
        "Dinov2Model", PIXELS, **SMALL_VISION, mlp_ratio=2)),
    Architecture("beit", "BEiT", "transformers", configured(
        "BeitModel", PIXELS, **SMALL_VISION, use_relative_position_bias=True)),
    Architecture("vit_mae", "MAE", "transformers", configured(
        "ViTMAEForPreTraining", PIXELS, **SMALL_VISION, decoder_hidden_size=64, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4, decoder_intermediate_size=128)),
)  # fmt: skip
"""Classifiers and encoders of images."""
