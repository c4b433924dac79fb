"""Data that ships with the package (photographs, MEG), random crops, measurement models, checked downloads."""

from firmly.data.corruptions import Measurement, column_mask, pixel_mask
from firmly.data.crops import Crops, centre_crop
from firmly.data.download import download
from firmly.data.meg_data import Leadfield, Recording, meg_sample, vectorview
from firmly.data.photographs import Photograph, catalogue, photographs, read_image

__all__ = [
    "Crops",
    "Leadfield",
    "Measurement",
    "Photograph",
    "Recording",
    "catalogue",
    "centre_crop",
    "column_mask",
    "download",
    "meg_sample",
    "photographs",
    "pixel_mask",
    "read_image",
    "vectorview",
]
