// Ends what vec_avx2.h or vec_avx512.h began. gcc's pragma lasts to the end of the file by itself.
#if defined(__clang__)
#pragma clang attribute pop
#endif
