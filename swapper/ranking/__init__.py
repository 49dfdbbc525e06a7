"""What ``swapper.selection`` ranks by and answers with. Pure, as it is."""
