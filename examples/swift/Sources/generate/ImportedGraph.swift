import Cmlx
import MLX

/// A function from a `.mlxfn` file. MLX Swift's `ImportedFunction` is the same, but is called with arguments
/// that are written one by one, and how many these are depends on the model.
final class ImportedGraph {
    private let function: mlx_imported_function

    init(path: String) throws {
        function = try withError { mlx_imported_function_new(path) }
    }

    deinit {
        mlx_imported_function_free(function)
    }

    func callAsFunction(_ inputs: [MLXArray]) -> [MLXArray] {
        let arguments = mlx_vector_array_new_data(inputs.map { $0.ctx }, inputs.count)
        defer { mlx_vector_array_free(arguments) }
        var found = mlx_vector_array_new()
        defer { mlx_vector_array_free(found) }
        mlx_imported_function_apply(&found, function, arguments)
        return (0 ..< mlx_vector_array_size(found)).map { index in
            var array = mlx_array_new()
            mlx_vector_array_get(&array, found, index)
            return MLXArray(array)
        }
    }
}
