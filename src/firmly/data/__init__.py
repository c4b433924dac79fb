"""Data in the package (photographs, MEG, ECG, a sinogram), image sets, crops, measurement models, checked downloads."""

from firmly.data.corruptions import Measurement, column_mask, pixel_mask
from firmly.data.crops import Crops, centre_crop
from firmly.data.download import download
from firmly.data.image_sets import ImageSet, cifar10, cifar100, fashion_mnist, mnist
from firmly.data.meg_data import Leadfield, Recording, leadfield_from_mne, meg_sample, vectorview
from firmly.data.photographs import Photograph, catalogue, photographs, read_image
from firmly.data.recordings import ecg
from firmly.data.tomography import Sinogram, centre_of_rotation, rebinned, tooth

__all__ = [
    "Crops",
    "ImageSet",
    "Leadfield",
    "Measurement",
    "Photograph",
    "Recording",
    "Sinogram",
    "catalogue",
    "centre_crop",
    "centre_of_rotation",
    "cifar10",
    "cifar100",
    "column_mask",
    "download",
    "ecg",
    "fashion_mnist",
    "leadfield_from_mne",
    "meg_sample",
    "mnist",
    "photographs",
    "pixel_mask",
    "read_image",
    "rebinned",
    "tooth",
    "vectorview",
]
