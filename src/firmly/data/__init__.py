"""Data in the package (photographs, MEG, ECG, a sinogram, brains, organs, streams), image sets, measurement models."""

from firmly.data.brain import TISSUES, brain_slices
from firmly.data.corruptions import Measurement, column_mask, pixel_mask
from firmly.data.crops import Crops, centre_crop
from firmly.data.download import download
from firmly.data.image_sets import ImageSet, cifar10, cifar100, fashion_mnist, mnist
from firmly.data.label_maps import LabelledSlices
from firmly.data.meg_data import Leadfield, Recording, leadfield_from_mne, meg_sample, vectorview
from firmly.data.organs import ORGANS, organ_slices
from firmly.data.photographs import Photograph, catalogue, photographs, read_image
from firmly.data.recordings import ecg
from firmly.data.streams import LabelledStream, covtype, elec2
from firmly.data.tomography import Sinogram, centre_of_rotation, rebinned, tooth

__all__ = [
    "ORGANS",
    "TISSUES",
    "Crops",
    "ImageSet",
    "LabelledSlices",
    "LabelledStream",
    "Leadfield",
    "Measurement",
    "Photograph",
    "Recording",
    "Sinogram",
    "brain_slices",
    "catalogue",
    "centre_crop",
    "centre_of_rotation",
    "cifar10",
    "cifar100",
    "column_mask",
    "covtype",
    "download",
    "ecg",
    "elec2",
    "fashion_mnist",
    "leadfield_from_mne",
    "meg_sample",
    "mnist",
    "organ_slices",
    "photographs",
    "pixel_mask",
    "read_image",
    "rebinned",
    "tooth",
    "vectorview",
]
