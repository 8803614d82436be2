"""Data sets, optimizees, and the two composed."""

from .dataset import Dataset as Dataset
from .dataset import Split as Split
from .datasets import DATASETS as DATASETS
from .datasets import cifar10 as cifar10
from .datasets import circles as circles
from .datasets import digits as digits
from .datasets import fashion_mnist as fashion_mnist
from .datasets import load_dataset as load_dataset
from .datasets import mnist as mnist
from .datasets import moons as moons
from .datasets import spirals as spirals
from .datasets import tiny_imagenet50_32px as tiny_imagenet50_32px
from .datasets import two_spirals as two_spirals
from .goals import CLASSIFICATION as CLASSIFICATION
from .goals import RECONSTRUCTION as RECONSTRUCTION
from .goals import Goal as Goal
from .models import MLP as MLP
from .models import ConvNet as ConvNet
from .models import Model as Model
from .models import ReluMLP as ReluMLP
from .published import PUBLISHED as PUBLISHED
from .published import published_task as published_task
from .task import Task as Task
from .task import TaskObjective as TaskObjective
