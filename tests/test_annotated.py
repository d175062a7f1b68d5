"""Annotated images: VOC's XML, COCO's JSON, masks, their batches, and what is refused."""

import itertools
import json
import tarfile

import pytest
import torch
from helpers import ROOT
from PIL import Image
from torchvision.utils import save_image

from downstream import annotated, detect, segment

SIZE = [40, 30]  # width, height


def noise(path, size=SIZE, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.rand(3, size[1], size[0], generator=torch.Generator().manual_seed(seed)), path)
    return path


def flags(module, *words):
    return module.parse_args(["random:resnet10_16", *map(str, words)])[0]


# ============ COCO's format ============


def write_coco(folder, name="instances.json", n=4, change=lambda content: None):
    """n images with a box and a crowd each, and one without objects."""
    images = [{"id": 10 + i, "file_name": f"{i}.png", "width": SIZE[0], "height": SIZE[1]} for i in range(n + 1)]
    for i in range(n + 1):
        noise(folder / "images" / f"{i}.png", seed=i)
    rle = {"size": SIZE[::-1], "counts": [30 * 5, 60, 30 * 33]}
    boxes = [{"id": i, "image_id": 10 + i, "category_id": 7, "bbox": [5, 6, 20, 8], "area": 160, "iscrowd": 0,
              "segmentation": [[5, 6, 25, 6, 25, 14, 5, 14]]} for i in range(n)]  # fmt: skip
    crowds = [{"id": 100 + i, "image_id": 10 + i, "category_id": 3, "bbox": [5, 0, 2, 30], "area": 60, "iscrowd": 1,
               "segmentation": rle} for i in range(n)]  # fmt: skip
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "bird"}]
    content = {"images": images, "annotations": boxes + crowds, "categories": categories}
    change(content)
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / name).write_text(json.dumps(content))
    return folder


def test_cocos_boxes_and_masks(tmp_path):
    write_coco(tmp_path)
    file, images = annotated.coco_folder(tmp_path, "train", True)
    test = annotated.coco(file, images, True, "x")
    train = annotated.with_objects(test)
    assert train.classes == ["bird", "cat"] and (len(train), len(test)) == (4, 5)
    image, target = train.read(0)
    assert image.shape == (3, 30, 40) and target["boxes"].tolist() == [[5, 6, 25, 14]]
    assert target["labels"].tolist() == [1] and target["masks"].shape == (1, 30, 40)
    mask = torch.zeros(30, 40, dtype=torch.bool)
    mask[6:14, 5:25] = True
    assert torch.equal(target["masks"][0], mask)
    _, target = test.read(0)
    assert target["ignored"].tolist() == [False, True] and target["labels"].tolist() == [1, 0]
    assert target["masks"][1].nonzero()[:, 1].unique().tolist() == [5, 6] and target["masks"][1].sum() == 60
    _, target = test.read(4)  # without objects
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 30, 40)
    assert test.ids[test.items[4][0]] == 14


def test_polygons_by_hand():
    triangle = annotated.mask_of([[0, 0, 20, 0, 0, 20]], 40, 30)  # row y: 20 - y pixels, less the half one at its end
    assert triangle.sum(1)[:21].tolist() == [*range(19, -1, -1), 0] and triangle[0, 0]
    assert annotated.mask_of([[-9, -9, 99, -9, 99, 99, -9, 99]], 40, 30).all()
    two = annotated.mask_of([[0, 0, 4, 0, 4, 4, 0, 4], [10, 10, 14, 10, 14, 14, 10, 14], [1, 2]], 40, 30)
    assert two.sum() == 32 and two[:4, :4].all() and two[10:14, 10:14].all()
    ring = annotated.mask_of([[0, 0, 9, 0, 9, 9, 0, 9, 0, 0, 3, 3, 6, 3, 6, 6, 3, 6, 3, 3]], 40, 30)  # with a hole
    assert ring.sum() == 81 - 9 and not ring[4, 4]


@pytest.mark.parametrize("name", ["instances.json", "instances_train2017.json", "train.json"])
def test_the_layouts_of_cocos_files(name, tmp_path):
    write_coco(tmp_path, name)
    if "2017" in name:
        (tmp_path / "images").rename(tmp_path / "train2017")
    file, images = annotated.coco_folder(tmp_path, "train", False)
    assert file.name == name and (images / "0.png").is_file()


def test_boxes_are_cut_at_the_edges(tmp_path, capsys):
    def change(content):
        content["annotations"][0]["bbox"] = [-5, 10, 100, 100]
        content["annotations"][1]["bbox"] = [50, 10, 5, 5]  # outside
        content["annotations"][2]["bbox"] = [5, 10, 0, 5]  # no area

    write_coco(tmp_path, change=change)
    train = annotated.coco(*annotated.coco_folder(tmp_path, "train", False), False, "x")
    assert train.read(0)[1]["boxes"].tolist() == [[0, 10, 40, 30], [5, 0, 7, 30]]
    assert [len(train.read(i)[1]["boxes"]) for i in range(4)] == [2, 1, 1, 2]
    assert "2 boxes reach over the edge and were cut, 2 have no area and were left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["annotations"][0].update(category_id=5), "annotation 0 has the unknown category 5"),
        (lambda c: c["annotations"][0].update(image_id=5), "annotation 0 belongs to the unknown image"),
        (lambda c: c["annotations"][0].pop("segmentation"), "annotation 0 has no segmentation"),
        (lambda c: c["annotations"][4]["segmentation"].update(size=[9, 9]), "annotation 100 has another size"),
        (lambda c: c["annotations"][4]["segmentation"].update(counts=[7]), "annotation 100 has another size"),
        (lambda c: c["annotations"][4]["segmentation"].update(counts="PX"), "compressed run lengths"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "not annotations in COCO's format"),
        (lambda c: c.pop("categories"), "not annotations in COCO's format"),
        (lambda c: c["annotations"][0].update(bbox=["1", 2, 3, 4]), "not annotations in COCO's format"),
        (lambda c: c["annotations"][0].update(segmentation=[5, 6, 25, 6, 25, 14]), "not annotations in COCO's format"),
        (lambda c: c["annotations"][0].update(segmentation=[[5, 6, 25]]), "neither polygons nor run lengths"),
        (lambda c: c["annotations"][0].update(segmentation=[[5, None]]), "not annotations in COCO's format"),
        (lambda c: c["annotations"][4]["segmentation"].update(counts=[1300, -100]), "neither polygons nor run lengths"),
        (lambda c: c["images"].clear() or c["annotations"].clear(), "no images"),
        (lambda c: c["images"][0].update(file_name="none.png"), "its first image is not there"),
    ],
)  # fmt: skip
def test_what_coco_files_are_refused(change, sentence, tmp_path, refused):
    write_coco(tmp_path, change=change)
    file, images = annotated.coco_folder(tmp_path, "train", True)
    assert sentence in refused(lambda: annotated.coco(file, images, True, "x"))


def test_what_is_no_json_is_refused(tmp_path, refused):
    write_coco(tmp_path)
    file, images = annotated.coco_folder(tmp_path, "train", True)
    file.write_text("{")
    assert "not annotations in COCO's format" in refused(lambda: annotated.coco(file, images, True, "x"))


def test_every_tenth_image_is_the_test_set_where_there_is_none(tmp_path):
    write_coco(tmp_path, n=20)
    train, test = annotated.detection(flags(detect, "--data", tmp_path), False)
    assert (len(train), len(test)) == (18, 2) and not {i for i, _ in train.items} & {i for i, _ in test.items}
    train, test = annotated.detection(flags(detect, "--data", tmp_path, "--overfit", "--limit", 7), False)
    assert len(train) == 7 and test is train


def test_images_without_objects_are_for_the_test_alone(tmp_path, refused):
    write_coco(tmp_path, n=12, change=lambda c: c["annotations"].__delitem__(0))  # image 0 has a crowd alone
    train, test = annotated.detection(flags(detect, "--data", tmp_path), False)
    assert [len(train), len(test)] == [10, 1] and not any(train.read(i)[1]["ignored"].any() for i in range(10))
    assert test.read(0)[1]["ignored"].tolist() == [False, True]
    train, test = annotated.detection(flags(detect, "--data", tmp_path, "--overfit"), False)
    assert [len(train), len(test)] == [11, 13] and test.read(0)[1]["ignored"].tolist() == [True]
    write_coco(tmp_path, change=lambda c: c["annotations"].clear())
    load = lambda: annotated.detection(flags(detect, "--data", tmp_path, "--overfit"), False)
    assert "no image has an object to train on" in refused(load)


def test_folders_may_be_called_like_sets(tmp_path):
    write_coco(tmp_path / "scenes_town", n=20)
    assert len(annotated.detection(flags(detect, "--data", tmp_path / "scenes_town"), False)[0]) == 18
    folder_of_masks(tmp_path / "scenes_px")
    assert annotated.segmentation(flags(segment, "--data", tmp_path / "scenes_px"))[0].classes == ["0", "1", "2"]


def test_an_image_of_another_size_ends_the_program(tmp_path, refused):
    write_coco(tmp_path)
    noise(tmp_path / "images" / "1.png", [20, 20])
    train = annotated.coco(*annotated.coco_folder(tmp_path, "train", False), False, "x")
    read = lambda: list(annotated.read(train, [[(0, 0), (0, 1)]], 0))
    assert "1.png has 20 x 20 px, its annotations say 40 x 30" in refused(read)


# ============ PASCAL VOC ============

XML = """<annotation><size><width>40</width><height>30</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object>
<object><name>person</name><part><name>head</name>
<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part><difficult>1</difficult>
<bndbox><xmin>6</xmin><ymin>7.5</ymin><xmax>20</xmax><ymax>15</ymax></bndbox>
</object></annotation>"""


def write_voc(root, year, **parts):
    base = root / "VOCdevkit" / f"VOC{year}"
    for part, names in parts.items():
        for kind in ("Main", "Segmentation"):
            (base / "ImageSets" / kind).mkdir(parents=True, exist_ok=True)
            (base / "ImageSets" / kind / f"{part}.txt").write_text("\n".join(names))
        for i, name in enumerate(names):
            noise(base / "JPEGImages" / f"{name}.jpg", seed=i)
            (base / "Annotations").mkdir(exist_ok=True)
            (base / "Annotations" / f"{name}.xml").write_text(XML)
            classes(base / "SegmentationClass" / f"{name}.png", [[0, 15], [255, 20]])
    return base


def classes(path, numbers):
    """A palette PNG whose quarters have these class numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = torch.tensor(numbers, dtype=torch.uint8).repeat_interleave(15, 0).repeat_interleave(20, 1)
    image = Image.fromarray(image.numpy(), "P")
    image.putpalette([v for i in range(256) for v in (i, 255 - i, 0)])
    image.save(path)


def test_vocs_boxes_count_from_one_and_include_their_end(tmp_path):
    write_voc(tmp_path, 2007, trainval=["000001", "000002"], test=["000003"])
    write_voc(tmp_path, 2012, trainval=["2008_1"])
    train, test = annotated.detection(flags(detect, "--data", "voc07", "--root", tmp_path), False)
    _, target = train.read(0)
    assert target["boxes"].tolist() == [[0, 0, 40, 30], [5, 6.5, 20, 15]]
    assert [train.classes[i] for i in target["labels"]] == ["cat", "person"]
    assert target["ignored"].tolist() == [False, True] and (len(train), len(test)) == (2, 1)
    assert len(annotated.detection(flags(detect, "--data", "voc0712", "--root", tmp_path), False)[0]) == 3


@pytest.mark.parametrize(
    ("xml", "sentence"),
    [
        (XML.replace("<name>cat", "<name>unicorn"), "unknown category 'unicorn'"),
        (XML.replace("xmin", "x"), "not annotations of PASCAL VOC"),
        ("<annotation>", "not annotations of PASCAL VOC"),
    ],
)
def test_what_voc_files_are_refused(xml, sentence, tmp_path, refused):
    (tmp_path / "a.xml").write_text(xml)
    assert sentence in refused(lambda: annotated.voc_objects(tmp_path / "a.xml"))


def test_vocs_masks(tmp_path, capsys):
    base = write_voc(tmp_path, 2012, train=["a", "b"], val=["c"])
    words = flags(segment, "--data", "voc12", "--root", tmp_path)
    train, test = annotated.segmentation(words)
    image, target = train.read(0)
    assert target["semantic"].shape == image.shape[1:] == (30, 40)
    assert [int(target["semantic"][y, x]) for y, x in ((0, 0), (0, 39), (29, 0), (29, 39))] == [0, 15, 255, 20]
    assert (len(train), len(test), len(train.classes)) == (2, 1, 21) and "without SBD's" in capsys.readouterr().out
    (base / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("a\nb\nc\n")
    for name in "abc":
        classes(base / "SegmentationClassAug" / f"{name}.png", [[1, 1], [1, 1]])
    train, _ = annotated.segmentation(words)
    assert len(train) == 3 and train.read(2)[1]["semantic"].unique().tolist() == [1]


# ============ Cityscapes and folders ============


def test_cityscapes_numbers_become_those_of_the_19_classes(tmp_path):
    for part in ("train", "val"):
        noise(tmp_path / "cityscapes" / "leftImg8bit" / part / "ulm" / "ulm_0_leftImg8bit.png")
        classes(tmp_path / "cityscapes" / "gtFine" / part / "ulm" / "ulm_0_gtFine_labelIds.png", [[7, 33], [0, 24]])
    train, test = annotated.segmentation(flags(segment, "--data", "cityscapes", "--root", tmp_path))
    assert (len(train), len(test), len(train.classes)) == (1, 1, 19) and train.classes[11] == "person"
    semantic = train.read(0)[1]["semantic"]
    assert [int(semantic[y, x]) for y, x in ((0, 0), (0, 39), (29, 0), (29, 39))] == [0, 18, 255, 11]


def folder_of_masks(folder, n=12):
    for i in range(n):
        noise(folder / "images" / f"{i}.png", seed=i)
        classes(folder / "masks" / f"{i}.png", [[0, 1], [i % 3, 255]])
    return folder


def test_a_folder_with_masks(tmp_path):
    folder_of_masks(tmp_path)
    train, test = annotated.segmentation(flags(segment, "--data", tmp_path))
    assert (len(train), len(test), train.classes) == (11, 1, ["0", "1", "2"])
    folder_of_masks(tmp_path / "two" / "train"), folder_of_masks(tmp_path / "two" / "val", 4)
    train, test = annotated.segmentation(flags(segment, "--data", tmp_path / "two"))
    assert (len(train), len(test)) == (12, 4)


def test_what_folders_are_refused(tmp_path, refused):
    load = lambda: annotated.segmentation(flags(segment, "--data", tmp_path))
    assert "no images/ and masks/ in it" in refused(load)
    folder_of_masks(tmp_path)
    train, _ = annotated.segmentation(flags(segment, "--data", tmp_path))
    read = lambda: list(annotated.read(train, [[(0, 0)]], 0))
    noise(tmp_path / "images" / "0.png", [20, 20])
    assert "0.png has 40 x 30 px, its image 20 x 20 px" in refused(read)
    noise(tmp_path / "images" / "0.png"), noise(tmp_path / "masks" / "0.png")
    assert "a PNG of one byte a pixel" in refused(read)
    folder_of_masks(tmp_path / "b")
    (tmp_path / "b" / "masks" / "3.png").unlink()
    folder_of_masks(tmp_path / "c", 1)
    classes(tmp_path / "c" / "masks" / "0.png", [[0, 255], [255, 0]])
    assert "one class at most" in refused(lambda: annotated.masks_folder(tmp_path / "c", "train"))
    assert "no mask of 1 images, for example of 3" in refused(lambda: annotated.masks_folder(tmp_path / "b", "train"))


@pytest.mark.parametrize("data", ["voc07", "voc12", "cityscapes"])
def test_sets_that_are_not_there_say_so(data, tmp_path, refused, monkeypatch):
    def offline(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", offline)
    load, module = (annotated.detection, detect) if data == "voc07" else (annotated.segmentation, segment)
    rest = [False] if data == "voc07" else []
    assert f"{data} could not be loaded" in refused(
        lambda: load(flags(module, "--data", data, "--root", tmp_path), *rest)
    )


# ============ batches ============


def test_batches_are_permutations_of_the_images():
    scenes = annotated.scenes("scenes", "train", 10)
    change = lambda image, target, g: (image, target | {"draw": torch.rand((), generator=g).item()})
    loader = annotated.Loader(scenes, 3, 0, 0, change)
    found = lambda *at: [[int(image.sum()) for image, _ in batch] for batch in loader.epoch(*at)]
    sums = {int(scenes.read(i)[0].sum()) for i in range(10)}
    first = list(itertools.chain(*found(0)))
    assert loader.steps == 3 and len(set(first)) == 9 and set(first) < sums and found(0) != found(1)
    assert found(0, 2) == found(0)[2:]
    draws = [[t["draw"] for _, t in batch] for batch in loader.epoch(0)]
    assert len(set(itertools.chain(*draws))) == 9 and draws == [
        [t["draw"] for _, t in batch] for batch in loader.epoch(0)
    ]


def test_ranks_share_a_batch_and_the_test(monkeypatch):
    scenes = annotated.scenes("scenes", "train", 10)
    sums = lambda batches: [[int(image.sum()) for image, _ in batch] for batch in batches]
    whole = sums(annotated.Loader(scenes, 4, 0, 0, None).epoch(0))
    monkeypatch.setattr(annotated.common, "world_size", lambda: 2)
    halves, tested = [], []
    for rank in (0, 1):
        monkeypatch.setattr(annotated.common, "rank", lambda rank=rank: rank)
        halves.append(sums(annotated.Loader(scenes, 4, 0, 0, None).epoch(0)))
        tested += [place for places, batch in annotated.test_batches(scenes, 3, 0) for place in places]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole and tested == list(range(10))


def test_workers_give_the_same_batches(tmp_path):
    write_coco(tmp_path)
    train = annotated.coco(*annotated.coco_folder(tmp_path, "train", True), True, "x")
    keys = [[(0, 1), (0, 2)], [(0, 0), (0, 3)]]
    alone, workers = (list(annotated.read(train, keys, n, 0, detect.change)) for n in (0, 2))
    for a, b in zip(itertools.chain(*alone), itertools.chain(*workers), strict=True):
        assert torch.equal(a[0], b[0]) and all(torch.equal(a[1][k], b[1][k]) for k in a[1])


def test_contents_change_with_annotations_and_images(tmp_path):
    write_coco(tmp_path)
    load = lambda: annotated.coco(*annotated.coco_folder(tmp_path, "train", False), False, "x").contents()
    before = load()
    assert load() == before
    write_coco(tmp_path, change=lambda c: c["annotations"][0].update(bbox=[5, 6, 20, 9]))
    assert load() != before
    folder_of_masks(tmp_path / "a", 3), folder_of_masks(tmp_path / "b" / "a", 3)
    one, two = (annotated.masks_folder(tmp_path / name, "train").contents() for name in ("a", "b/a"))
    assert one == two  # a folder may move
    classes(tmp_path / "a" / "masks" / "1.png", [[1] * 7] * 9)
    assert annotated.masks_folder(tmp_path / "a", "train").contents() != one
    assert annotated.scenes("scenes", "train", 4).contents() != annotated.scenes("scenes-hard", "train", 4).contents()


COCO128 = ROOT / ".." / "shared" / "data" / "coco128_320.tar"


@pytest.mark.skipif(not COCO128.is_file(), reason="coco128_320.tar is not there")
def test_real_annotations(tmp_path):
    """The boxes around the masks are those of the file."""
    with tarfile.open(COCO128) as tar:
        tar.extractall(tmp_path, filter="data")
    train = annotated.with_objects(annotated.coco(*annotated.coco_folder(tmp_path, "train", True), True, "coco128"))
    assert sum(len(train.read(i)[1]["labels"]) for i in range(len(train))) == 746 - 6  # less the crowds
    for i in range(0, len(train), 10):
        _, target = train.read(i)
        boxes = torch.stack([torch.cat([m.nonzero().amin(0).flip(0), m.nonzero().amax(0).flip(0) + 1])
                             for m in target["masks"]])  # fmt: skip
        assert (boxes - target["boxes"]).abs().max() <= 1.5
