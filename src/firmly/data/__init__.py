"""Data: the photographs that ship with the package, random crops, measurement models, checked downloads."""

from firmly.data.corruptions import Measurement, column_mask, pixel_mask
from firmly.data.crops import Crops, centre_crop
from firmly.data.download import download
from firmly.data.photographs import Photograph, catalogue, photographs, read_image

__all__ = [
    "Crops",
    "Measurement",
    "Photograph",
    "catalogue",
    "centre_crop",
    "column_mask",
    "download",
    "photographs",
    "pixel_mask",
    "read_image",
]
