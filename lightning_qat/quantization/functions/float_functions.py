"""The functions that stay in float, each with its reason. Part of the function table, see ``function_table.py``.

To make a function stay float, move its name from its row there to a row here.
"""

from __future__ import annotations

from lightning_qat.quantization.functions.op_spec import NO_FLOAT_RESULT, TRUE_OR_FALSE, OpSpec, rows

_STEPS = "jumps: an input error of one step can move the result by a whole unit"
_SPECIAL = "special function: its poles and steep ends leave no useful integer range"
_COMPLEX = "complex numbers have no integer grid here"
_LINALG = "matrix decomposition: amplifies input errors by the condition of the matrix"
_LOSS = "a loss is not part of an inference graph"
_RANDOM = "draws random values around its operands"
_SPARSE = "sparse tensors are not quantized"
_QUANTIZED = "torch's own quantized tensors and fake-quantizers are left alone"
_BACKEND = "kernel of one backend; its public form is quantized"
_BATCH_NORM = "a step of SyncBatchNorm's training, which is one batch_norm in inference"
_PYTHON = "runs Python code per element, or serves writers of tensor subclasses"
_STATISTIC = "counts or statistics for analysis, not part of an inference graph"
_MEMORY = "changes the memory behind a tensor"
_GRADIENT = "a gradient, not a value of the forward"
_DISTRIBUTED = "communication between processes"
_POLYNOMIAL = "powers and polynomials outgrow every integer range"
_BITS = "works on the bits of a number"
_EXPERTS = "product with the weights of several experts, or of float8 tensors"

_FLOAT: dict[str, OpSpec] = {
    **rows("float", "floor ceil round trunc frac sign sgn heaviside remainder fmod floor_divide", reason=_STEPS),
    **rows("float", "rremainder rfloor_divide", reason=_STEPS),
    **rows(
        "float", "lgamma mvlgamma digamma polygamma igamma igammac erfinv erfcx ndtri zeta airy_ai", reason=_SPECIAL
    ),
    **rows("float", "i0 i0e i1 i1e bessel_j0 bessel_j1 bessel_y0 bessel_y1 spherical_bessel_j0", reason=_SPECIAL),
    **rows("float", "modified_bessel_i0 modified_bessel_i1 modified_bessel_k0 modified_bessel_k1", reason=_SPECIAL),
    **rows("float", "scaled_modified_bessel_k0 scaled_modified_bessel_k1", reason=_SPECIAL),
    **rows("float", "chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v", reason=_POLYNOMIAL),
    **rows("float", "chebyshev_polynomial_w shifted_chebyshev_polynomial_t", reason=_POLYNOMIAL),
    **rows("float", "shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v", reason=_POLYNOMIAL),
    **rows("float", "shifted_chebyshev_polynomial_w hermite_polynomial_h hermite_polynomial_he", reason=_POLYNOMIAL),
    **rows("float", "laguerre_polynomial_l legendre_polynomial_p vander linalg_vander", reason=_POLYNOMIAL),
    **rows("float", "nextafter frexp bitwise_left_shift bitwise_right_shift", reason=_BITS),
    **rows("float", "angle polar complex view_as_complex view_as_complex_copy cdouble cfloat chalf", reason=_COMPLEX),
    **rows("float", "_neg_view_copy fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_ifftn fft_rfft", reason=_COMPLEX),
    **rows("float", "fft_rfft2 fft_rfftn fft_irfft fft_irfft2 fft_irfftn fft_hfft fft_hfft2", reason=_COMPLEX),
    **rows("float", "fft_hfftn fft_ihfft fft_ihfft2 fft_ihfftn stft istft", reason=_COMPLEX),
    **rows("float", "cholesky cholesky_inverse cholesky_solve det logdet slogdet inverse pinverse", reason=_LINALG),
    **rows("float", "matrix_exp matrix_power nuclear_norm qr geqrf orgqr ormqr svd svd_lowrank", reason=_LINALG),
    **rows("float", "pca_lowrank lobpcg lu lu_solve lu_unpack triangular_solve eig symeig solve lstsq", reason=_LINALG),
    **rows("float", "linalg_cholesky linalg_cholesky_ex linalg_cond linalg_det linalg_eig linalg_eigh", reason=_LINALG),
    **rows("float", "linalg_eigvals linalg_eigvalsh linalg_householder_product linalg_inv", reason=_LINALG),
    **rows("float", "linalg_inv_ex linalg_ldl_factor linalg_ldl_factor_ex linalg_ldl_solve", reason=_LINALG),
    **rows("float", "linalg_lstsq linalg_lu linalg_lu_factor linalg_lu_factor_ex linalg_lu_solve", reason=_LINALG),
    **rows("float", "linalg_matrix_exp linalg_matrix_power linalg_pinv linalg_qr linalg_slogdet", reason=_LINALG),
    **rows("float", "linalg_solve linalg_solve_ex linalg_solve_triangular linalg_svd linalg_svdvals", reason=_LINALG),
    **rows("float", "linalg_tensorinv linalg_tensorsolve", reason=_LINALG),
    **rows("float", "binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss", reason=_LOSS),
    **rows("float", "cross_entropy cross_entropy_loss ctc_loss gaussian_nll_loss hinge_embedding_loss", reason=_LOSS),
    **rows("float", "huber_loss kl_div l1_loss linear_cross_entropy margin_ranking_loss mse_loss", reason=_LOSS),
    **rows("float", "multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss nll_loss", reason=_LOSS),
    **rows("float", "nll_loss_nd nll_loss2d poisson_nll_loss smooth_l1_loss soft_margin_loss", reason=_LOSS),
    **rows("float", "triplet_margin_loss triplet_margin_with_distance_loss", reason=_LOSS),
    **rows("float", "normal bernoulli binomial poisson", reason=_RANDOM),
    **rows("float", "dsmm hsmm hspmm smm spmm saddmm sspaddmm sparse_mask _sparse_mask_projection", reason=_SPARSE),
    **rows("float", "to_dense _to_dense to_sparse to_mkldnn coalesce _coalesced values _values", reason=_SPARSE),
    **rows("float", "values_copy _values_copy _sparse_broadcast_to_copy sparse_resize", reason=_SPARSE),
    **rows("float", "to_sparse_coo to_sparse_csr to_sparse_csc to_sparse_bsr to_sparse_bsc", reason=_SPARSE),
    **rows("float", "sparse_resize_and_clear resize_as_sparse sparse sparse_sampled_addmm", reason=_SPARSE),
    **rows("float", "sparse_coo_tensor sparse_compressed_tensor sparse_csr_tensor sparse_csc_tensor", reason=_SPARSE),
    **rows("float", "sparse_bsr_tensor sparse_bsc_tensor", reason=_SPARSE),
    **rows(
        "float", "dequantize quantize_per_channel quantize_per_tensor quantize_per_tensor_dynamic", reason=_QUANTIZED
    ),
    **rows("float", "fake_quantize_per_channel_affine fake_quantize_per_tensor_affine", reason=_QUANTIZED),
    **rows(
        "float", "fused_moving_avg_obs_fake_quant q_per_channel_scales q_per_channel_zero_points", reason=_QUANTIZED
    ),
    **rows("float", "quantized_batch_norm quantized_gru_cell quantized_lstm_cell", reason=_QUANTIZED),
    **rows("float", "quantized_max_pool1d quantized_max_pool2d quantized_max_pool3d", reason=_QUANTIZED),
    **rows("float", "quantized_rnn_relu_cell quantized_rnn_tanh_cell empty_quantized", reason=_QUANTIZED),
    **rows("float", "choose_qparams_optimized _rowwise_prune", reason=_QUANTIZED),
    **rows("float", "fbgemm_linear_fp16_weight fbgemm_linear_fp16_weight_fp32_activation", reason=_BACKEND),
    **rows("float", "fbgemm_linear_int8_weight fbgemm_linear_int8_weight_fp32_activation", reason=_BACKEND),
    **rows("float", "fbgemm_linear_quantize_weight fbgemm_pack_gemm_matrix_fp16", reason=_BACKEND),
    **rows("float", "fbgemm_pack_quantized_matrix _wrapped_linear_prepack", reason=_BACKEND),
    **rows("float", "_wrapped_quantized_linear_prepacked miopen_batch_norm miopen_convolution", reason=_BACKEND),
    **rows("float", "miopen_convolution_add_relu miopen_convolution_relu miopen_rnn", reason=_BACKEND),
    **rows("float", "miopen_convolution_transpose miopen_depthwise_convolution miopen_ctc_loss", reason=_BACKEND),
    **rows("float", "cudnn_affine_grid_generator cudnn_batch_norm cudnn_convolution", reason=_BACKEND),
    **rows("float", "cudnn_convolution_add_relu cudnn_convolution_relu cudnn_grid_sampler", reason=_BACKEND),
    **rows("float", "cudnn_convolution_transpose mkldnn_adaptive_avg_pool2d mkldnn_convolution", reason=_BACKEND),
    **rows("float", "mkldnn_linear mkldnn_linear_backward_weights mkldnn_max_pool2d mkldnn_prelu", reason=_BACKEND),
    **rows("float", "mkldnn_max_pool3d mkldnn_rnn_layer", reason=_BACKEND),
    **rows(
        "float", "conv_depthwise3d slow_conv3d slow_conv_dilated2d slow_conv_dilated3d thnn_conv2d", reason=_BACKEND
    ),
    **rows("float", "slow_conv_transpose2d slow_conv_transpose3d rrelu_with_noise embedding_renorm", reason=_BACKEND),
    **rows("float", "mkldnn_reorder_conv2d_weight mkldnn_reorder_conv3d_weight", reason=_BACKEND),
    **rows("float", "batch_norm_backward_elemt batch_norm_backward_reduce batch_norm_elemt", reason=_BATCH_NORM),
    **rows("float", "batch_norm_gather_stats batch_norm_gather_stats_with_counts", reason=_BATCH_NORM),
    **rows("float", "batch_norm_stats batch_norm_update_stats", reason=_BATCH_NORM),
    **rows("float", "apply map map2 module_load array_wrap as_subclass", reason=_PYTHON),
    **rows("float", "histc histogram histogramdd cov corrcoef gradient", reason=_STATISTIC),
    **rows("float", "set resize resize_as to_padded_tensor nested_to_padded_tensor", reason=_MEMORY),
    **rows("float", "grad _grad", reason=_GRADIENT),
    **rows("float", "grouped_mm _grouped_mm scaled_mm scaled_grouped_mm _scaled_mm", reason=_EXPERTS),
    **rows("float", "distributed_broadcast distributed_all_reduce distributed_reduce", reason=_DISTRIBUTED),
    **rows("float", "distributed_all_reduce_coalesced distributed_all_gather distributed_gather", reason=_DISTRIBUTED),
    **rows("float", "distributed_all_gather_single distributed_all_gather_coalesced", reason=_DISTRIBUTED),
    **rows(
        "float", "distributed_scatter distributed_reduce_scatter distributed_reduce_scatter_single", reason=_DISTRIBUTED
    ),
    **rows("float", "distributed_all_to_all_single distributed_all_to_all distributed_isend", reason=_DISTRIBUTED),
    **rows("float", "distributed_irecv distributed_send distributed_recv", reason=_DISTRIBUTED),
}

_COMPARISONS: dict[str, OpSpec] = {
    **rows("float", "eq ne lt le gt ge equal allclose isclose isfinite isinf isnan isneginf", reason=TRUE_OR_FALSE),
    **rows("float", "isposinf isreal isin all any signbit contains logical_and logical_not", reason=TRUE_OR_FALSE),
    **rows("float", "logical_or logical_xor is_nonzero __bool__ __nonzero__", reason=TRUE_OR_FALSE),
    **rows("float", "bitwise_and bitwise_not bitwise_or bitwise_xor", reason=TRUE_OR_FALSE),
}

_NOTHING: dict[str, OpSpec] = rows(
    "float",
    "_functional_assert_async _assert_async "
    # integers: indices, counts, casts
    "argmax argmin argsort argwhere nonzero nonzero_static count_nonzero bincount bucketize searchsorted multinomial "
    "one_hot unravel_index gcd lcm bool byte char short int long int_repr hash_tensor linalg_matrix_rank indices "
    "_indices indices_copy _indices_copy crow_indices crow_indices_copy col_indices col_indices_copy ccol_indices "
    "ccol_indices_copy row_indices row_indices_copy index "
    # Python numbers and objects
    "item tolist numpy array dlpack dlpack_device __int__ __long__ __float__ __complex__ __index__ __len__ "
    "format repr storage untyped_storage storage_type data_ptr const_data_ptr record_stream sym_float "
    "sym_int sym_ite sym_max sym_min sym_not sym_sum _sym_acos _sym_asin _sym_atan _sym_cos _sym_cosh _sym_sin "
    "_sym_sinh _sym_sqrt _sym_tan _sym_tanh reduce_ex setstate hash dir "
    # shape, type and place of a tensor
    "shape size stride dim ndim ndimension numel nelement nbytes itemsize element_size storage_offset dim_order "
    "sparse_dim dense_dim _dimI _dimV _nnz dtype device get_device layout name names output_nr volatile qscheme "
    "q_scale q_zero_point q_per_channel_axis _version _cdata _nested_tensor_size _nested_tensor_strides "
    "_nested_tensor_storage_offsets is_coalesced is_complex is_conj is_contiguous is_cpu is_cuda is_distributed "
    "is_floating_point is_inference is_ipu is_leaf is_maia is_meta is_mkldnn is_mps is_mtia is_neg is_nested "
    "is_pinned is_quantized is_same_size is_set_to is_shared is_signed is_sparse is_sparse_csr is_vulkan is_xla "
    "is_xpu _is_view property __cuda_array_interface__ autocast "
    # autograd
    "backward requires_grad retains_grad retain_grad grad_fn _grad_fn grad_dtype register_hook "
    "register_post_accumulate_grad_hook _backward_hooks _post_accumulate_grad_hooks "
    "_clear_non_serializable_cached_data _set_grad_enabled",
    reason=NO_FLOAT_RESULT,
)

FLOAT_FUNCTIONS: dict[str, OpSpec] = {**_FLOAT, **_COMPARISONS, **_NOTHING}
