"""Class-balanced augmentation: from `train.csv` to `aug.csv`, through a server or offline."""
