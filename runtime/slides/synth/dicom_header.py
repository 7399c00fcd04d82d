"""The headers of synthetic DICOM whole-slide instances, through pydicom. DICOM PS3.3 A.32.8, C.8.12."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom import Dataset

# codec -> (transfer syntax, photometric interpretation). Encoded by the caller: baseline JPEG as YCbCr or RGB,
# JPEG 2000 (irreversible, reversible; declared RGB where its codestream has no colour transform), interleaved RGB.
CODECS: dict[str, tuple[str, str]] = {
    "jpeg": ("1.2.840.10008.1.2.4.50", "YBR_FULL_422"),
    "jpeg-rgb": ("1.2.840.10008.1.2.4.50", "RGB"),
    "jpeg2000": ("1.2.840.10008.1.2.4.91", "YBR_ICT"),
    "jpeg2000-lossless": ("1.2.840.10008.1.2.4.90", "YBR_RCT"),
    "raw": ("1.2.840.10008.1.2.1", "RGB"),
}
_WSI_STORAGE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_LOSSLESS = ("raw", "jpeg2000-lossless")
_EMPTY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName"),
)
_FIXED = {
    "Modality": "SM",
    "PositionReferenceIndicator": "SLIDE_CORNER",
    "InstanceNumber": 1,
    "SeriesNumber": 1,
    "ContentDate": "20000101",
    "ContentTime": "000000",
    "AcquisitionDateTime": "20000101000000",
    "ContainerIdentifier": "synthetic",
    "Manufacturer": "wsi-rt",
    "ManufacturerModelName": "wsi-rt",
    "DeviceSerialNumber": "0",
    "SoftwareVersions": "wsi-rt",
    "SamplesPerPixel": 3,
    "PlanarConfiguration": 0,
    "BitsAllocated": 8,
    "BitsStored": 8,
    "HighBit": 7,
    "PixelRepresentation": 0,
    "BurnedInAnnotation": "NO",
    "VolumetricProperties": "VOLUME",
    "FocusMethod": "AUTO",
    "ExtendedDepthOfField": "NO",
    "TotalPixelMatrixFocalPlanes": 1,
    "NumberOfOpticalPaths": 1,
    "ImagedVolumeDepth": 1.0,
    "ImageOrientationSlide": [0, -1, 0, -1, 0, 0],
}


def instance_header(
    name: str, image_type: list[str], size: tuple[int, int], mpp: float, codec: str, uid: Callable[[str], str]
) -> Dataset:
    """What every instance carries, without its frames; the patient's and the study's own fields are there and empty.

    name: of the instance, for its UID.  size: (width, height), px.  mpp: um/px.  uid: gives the UID for a name.
    """
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID

    syntax, photometric = CODECS[codec]
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = UID(_WSI_STORAGE)
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = UID(uid(name))
    header.file_meta.TransferSyntaxUID = UID(syntax)
    for keyword, value in {**dict.fromkeys(_EMPTY, ""), **_FIXED}.items():
        setattr(header, keyword, value)
    header.SeriesInstanceUID, header.StudyInstanceUID = uid("series"), uid("study")
    header.FrameOfReferenceUID = uid("frame of reference")
    header.ImageType = image_type
    header.PhotometricInterpretation = photometric
    header.LossyImageCompression = "00" if codec in _LOSSLESS else "01"
    header.TotalPixelMatrixColumns, header.TotalPixelMatrixRows = size
    header.ImagedVolumeWidth, header.ImagedVolumeHeight = (edge * mpp / 1000 for edge in size)  # mm
    _add_sequences(header, mpp, image_type)
    header.DimensionOrganizationSequence = [_item(DimensionOrganizationUID=uid("dimensions"))]
    return header


def frame_groups(col: int, row: int, tile: int, mpp: float) -> Dataset:
    """The item of PerFrameFunctionalGroupsSequence that places a frame of TILED_SPARSE."""
    from pydicom.valuerep import format_number_as_ds

    x, y = (format_number_as_ds(index * tile * mpp / 1000) for index in (col, row))  # mm
    return _item(
        FrameContentSequence=[_item(DimensionIndexValues=[col + 1, row + 1])],
        PlanePositionSlideSequence=[
            _item(
                ColumnPositionInTotalImagePixelMatrix=col * tile + 1,
                RowPositionInTotalImagePixelMatrix=row * tile + 1,
                XOffsetInSlideCoordinateSystem=x,
                YOffsetInSlideCoordinateSystem=y,
                ZOffsetInSlideCoordinateSystem="0",
            )
        ],
    )


def _item(**values: Any) -> Dataset:
    from pydicom import Dataset

    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def _code(concept: Any) -> list[Dataset]:
    scheme = concept.scheme_designator
    return [_item(CodeValue=concept.value, CodingSchemeDesignator=scheme, CodeMeaning=concept.meaning)]


def _add_sequences(header: Dataset, mpp: float, image_type: list[str]) -> None:
    from pydicom.sr.codedict import codes
    from pydicom.valuerep import format_number_as_ds

    spacing = format_number_as_ds(mpp / 1000)  # mm
    header.OpticalPathSequence = [
        _item(
            OpticalPathIdentifier="1",
            IlluminationTypeCodeSequence=_code(codes.DCM.BrightfieldIllumination),
            IlluminationColorCodeSequence=_code(codes.SCT.FullSpectrum),
        )
    ]
    header.SharedFunctionalGroupsSequence = [
        _item(
            PixelMeasuresSequence=[_item(PixelSpacing=[spacing, spacing], SliceThickness="0.001")],
            WholeSlideMicroscopyImageFrameTypeSequence=[_item(FrameType=image_type)],
            OpticalPathIdentificationSequence=[_item(OpticalPathIdentifier="1")],
        )
    ]
    header.TotalPixelMatrixOriginSequence = [
        _item(XOffsetInSlideCoordinateSystem="0", YOffsetInSlideCoordinateSystem="0")
    ]
    header.SpecimenDescriptionSequence = [_item(SpecimenIdentifier="synthetic")]
    header.AcquisitionContextSequence = []
