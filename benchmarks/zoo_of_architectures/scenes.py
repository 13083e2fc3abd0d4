"""Networks of scenes, of videos, and of diffusion."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn, tensor

from zoo_of_architectures.entry import Architecture, Built, called, clip, configured, image, named, noise
from zoo_of_architectures.images import PIXELS, SMALL_VISION, VISION


def segmenter(name: str, encoder: str) -> Any:
    """A builder of a network of segmentation-models-pytorch."""
    return called(
        f"segmentation_models_pytorch:{name}", image(64), encoder_name=encoder, encoder_weights=None, classes=4
    )


def fcn() -> Built:
    """torchvision's FCN on a dilated ResNet with a block per stage."""
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.resnet import Bottleneck, ResNet
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    body = ResNet(Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=[False, True, True], width_per_group=16)
    return FCN(IntermediateLayerGetter(body, {"layer3": "out"}), FCNHead(1024, 4)), image(64)()


def pyramid() -> nn.Module:
    """The feature pyramid of a small MobileNet that torchvision's detectors stand on here."""
    from torchvision.models import mobilenet_v3_small
    from torchvision.models.detection.backbone_utils import _mobilenet_extractor

    return _mobilenet_extractor(mobilenet_v3_small(weights=None), fpn=True, trainable_layers=6)


def detector(name: str) -> Any:
    """A builder of a torchvision detector of one stage that always reports as many boxes: no score is too low."""

    def make() -> Built:
        from torchvision.models import detection

        sizes = ((8,), (16,), (32,)) if name == "FCOS" else ((32,), (64,), (128,))
        ratios = ((1.0,) if name == "FCOS" else (0.5, 1.0, 2.0),) * 3
        anchors = detection.anchor_utils.AnchorGenerator(sizes, ratios)
        report = {"score_thresh": 0.0, "detections_per_img": 8, "nms_thresh": 1.1, "min_size": 128, "max_size": 128}
        network = getattr(detection, name)(pyramid(), num_classes=4, anchor_generator=anchors, **report)
        return network, ([noise(3, 128, 128)],)

    return make


def region_detector(name: str) -> Any:
    """A builder of a torchvision detector of two stages that always reports as many boxes, with narrow heads."""

    def make() -> Built:
        from torchvision.models import detection
        from torchvision.models.detection import faster_rcnn, keypoint_rcnn, mask_rcnn

        anchors = detection.anchor_utils.AnchorGenerator(((32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 3)
        report = {"box_score_thresh": 0.0, "box_detections_per_img": 8, "box_nms_thresh": 1.1, "min_size": 128}
        heads: dict[str, nn.Module] = {
            "box_head": faster_rcnn.TwoMLPHead(256 * 7 * 7, 128),
            "box_predictor": faster_rcnn.FastRCNNPredictor(128, 4),
        }
        if name == "MaskRCNN":
            heads["mask_head"] = mask_rcnn.MaskRCNNHeads(256, (64, 64), 1)
            heads["mask_predictor"] = mask_rcnn.MaskRCNNPredictor(64, 64, 4)
        if name == "KeypointRCNN":
            heads["keypoint_head"] = keypoint_rcnn.KeypointRCNNHeads(256, (64, 64))
            heads["keypoint_predictor"] = keypoint_rcnn.KeypointRCNNPredictor(64, 5)
        proposals = {"rpn_anchor_generator": anchors, "rpn_post_nms_top_n_test": 32}
        network = getattr(detection, name)(pyramid(), **proposals, **report, **heads)
        return network, ([noise(3, 128, 128)],)

    return make


def recurrent_flow() -> Built:
    """torchvision's small RAFT, of two refinements of the flow between two images."""
    from torchvision.models.optical_flow import raft_small

    pair = {"image1": noise(1, 3, 128, 128), "image2": -noise(1, 3, 128, 128)}
    return raft_small(weights=None), {**pair, "num_flow_updates": 2}


def video_resnet(convolution: str, stem: str) -> Any:
    """A builder of a torchvision ResNet of videos with a block per stage."""

    def make() -> Built:
        from torchvision.models.video import resnet

        convolutions = [getattr(resnet, convolution)] * 4
        network = resnet.VideoResNet(
            resnet.BasicBlock, convolutions, [1, 1, 1, 1], getattr(resnet, stem), num_classes=10
        )
        return network, clip(4, 32)()

    return make


def detr() -> Built:
    """DETR on a small ResNet of transformers."""
    transformers = import_module("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    settings = transformers.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=64,
        encoder_layers=2, decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128, encoder_attention_heads=4,
        decoder_attention_heads=4, num_queries=10,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(settings), {"pixel_values": noise(1, 3, 64, 64)}


def upernet() -> Built:
    """UperNet on a small ConvNeXt of transformers."""
    transformers = import_module("transformers")
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    settings = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=64, auxiliary_in_channels=96, num_labels=4
    )
    return transformers.UperNetForSemanticSegmentation(settings), {"pixel_values": noise(1, 3, 64, 64)}


def denoiser() -> dict[str, Any]:
    """Keyword arguments of an unconditional diffusion network."""
    return {"sample": noise(1, 3, 32, 32), "timestep": 10}


def told_denoiser() -> dict[str, Any]:
    """Keyword arguments of a diffusion network conditioned on encoded text."""
    return {"sample": noise(1, 4, 16, 16), "timestep": 10, "encoder_hidden_states": noise(1, 8, 64)}


def labelled_denoiser() -> dict[str, Any]:
    """Keyword arguments of a diffusion transformer conditioned on a class."""
    return {"hidden_states": noise(1, 4, 16, 16), "timestep": tensor([10]), "class_labels": tensor([3])}


def told_transformer() -> dict[str, Any]:
    """Keyword arguments of a diffusion transformer of text and image tokens together."""
    return {
        "hidden_states": noise(1, 4, 16, 16),
        "encoder_hidden_states": noise(1, 8, 64),
        "pooled_projections": noise(1, 64),
        "timestep": tensor([10]),
    }


DENSE = (
    Architecture("unet", "U-Net", "segmentation_models_pytorch", segmenter("Unet", "mobilenet_v2")),
    Architecture("fpn", "FPN", "segmentation_models_pytorch", segmenter("FPN", "mobilenet_v2")),
    Architecture("deeplabv3plus", "DeepLabV3", "segmentation_models_pytorch", segmenter(
        "DeepLabV3Plus", "timm-mobilenetv3_small_100")),
    Architecture("deeplabv3_mobilenet", "DeepLabV3", "torchvision", called(
        "torchvision.models.segmentation:deeplabv3_mobilenet_v3_large", image(64), num_classes=4,
        weights_backbone=None)),
    Architecture("lraspp", "LR-ASPP", "torchvision", called(
        "torchvision.models.segmentation:lraspp_mobilenet_v3_large", image(64), num_classes=4,
        weights_backbone=None)),
    Architecture("fcn", "FCN", "torchvision", fcn),
    Architecture("segformer", "SegFormer", "transformers", configured(
        "SegformerForSemanticSegmentation", named("pixel_values", image(64)), hidden_sizes=[32, 64, 96, 128],
        depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=64)),
    Architecture("upernet", "UperNet", "transformers", upernet),
    Architecture("dpt", "DPT", "transformers", configured(
        "DPTForDepthEstimation", named("pixel_values", image(32)), **{**SMALL_VISION, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 32, 48, 64], fusion_hidden_size=32)),
    Architecture("raft_small", "RAFT", "torchvision", recurrent_flow),
    Architecture("faster_rcnn", "Faster R-CNN", "torchvision", region_detector("FasterRCNN")),
    Architecture("mask_rcnn", "Mask R-CNN", "torchvision", region_detector("MaskRCNN")),
    Architecture("keypoint_rcnn", "Keypoint R-CNN", "torchvision", region_detector("KeypointRCNN")),
    Architecture("retinanet", "RetinaNet", "torchvision", detector("RetinaNet")),
    Architecture("fcos", "FCOS", "torchvision", detector("FCOS")),
    Architecture("ssdlite", "SSD", "torchvision", called(
        "torchvision.models.detection:ssdlite320_mobilenet_v3_large", lambda: ([noise(3, 320, 320)],), weights=None,
        weights_backbone=None, num_classes=4, score_thresh=0.0, detections_per_img=8, nms_thresh=1.1)),
    Architecture("detr", "DETR", "transformers", detr),
    Architecture("yolos", "YOLOS", "transformers", configured(
        "YolosForObjectDetection", PIXELS, **{**VISION, "image_size": [32, 32], "patch_size": 8},
        num_detection_tokens=10)),
)  # fmt: skip
"""Segmentation, depth, flow and detection."""

VIDEOS = (
    Architecture("r3d", "Video ResNet", "torchvision", video_resnet("Conv3DSimple", "BasicStem")),
    Architecture("r2plus1d", "Video ResNet", "torchvision", video_resnet("Conv2Plus1D", "R2Plus1dStem")),
    Architecture("swin3d", "Video Swin", "torchvision", called(
        "torchvision.models.video:SwinTransformer3d", clip(4, 32), [2, 4, 4], 48, [2, 2], [3, 6], [2, 4, 4],
        num_classes=10)),
    Architecture("videomae", "VideoMAE", "transformers", configured(
        "VideoMAEModel", named("pixel_values", lambda: noise(1, 4, 3, 32, 32)), **SMALL_VISION, num_frames=4)),
    Architecture("timesformer", "TimeSformer", "transformers", configured(
        "TimesformerModel", named("pixel_values", lambda: noise(1, 4, 3, 32, 32)), **SMALL_VISION, num_frames=4)),
)  # fmt: skip
"""Videos."""

DIFFUSION = (
    Architecture("unet2d", "Diffusion U-Net", "diffusers", called(
        "diffusers:UNet2DModel", denoiser, sample_size=32, block_out_channels=(32, 64, 64), norm_num_groups=8,
        layers_per_block=1, attention_head_dim=16, down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))),
    Architecture("unet2d_condition", "Diffusion U-Net", "diffusers", called(
        "diffusers:UNet2DConditionModel", told_denoiser, sample_size=16, block_out_channels=(32, 64),
        layers_per_block=1, cross_attention_dim=64, attention_head_dim=4, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))),
    Architecture("autoencoder_kl", "Diffusion autoencoder", "diffusers", called(
        "diffusers:AutoencoderKL", image(32), block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)),
    Architecture("vq_model", "Diffusion autoencoder", "diffusers", called(
        "diffusers:VQModel", image(32), block_out_channels=(32, 64), norm_num_groups=8, num_vq_embeddings=64,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)),
    Architecture("dit", "DiT", "diffusers", called(
        "diffusers:DiTTransformer2DModel", labelled_denoiser, num_attention_heads=4, attention_head_dim=32,
        in_channels=4, num_layers=2, sample_size=16, num_embeds_ada_norm=10)),
    Architecture("mmdit", "DiT", "diffusers", called(
        "diffusers:SD3Transformer2DModel", told_transformer, sample_size=16, in_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=64,
        pooled_projection_dim=64, out_channels=4, pos_embed_max_size=16)),
)  # fmt: skip
"""Networks of diffusion."""

SCENES = (*DENSE, *VIDEOS, *DIFFUSION)
